"""How much an answer tells: a model's policy, no part of its recipe, since the weights know nothing of it."""

from enum import StrEnum


class Answers(StrEnum):
    """What callers are told of the aggregated scores. The reason to tell less: whoever may ask often can compare an
    answer's last digits before and after a deletion, or with those of records that were trained on, and so guess who
    is in the data; the label alone, and a coarse score, tell them far less.
    """

    PROBABILITIES = "probabilities"
    """Every class's probability, rounded to six places; a regression's value to a millionth of its spread."""
    TOP1 = "top1"
    """The label and its probability, rounded to two places; a regression's value to a hundredth of its spread."""
