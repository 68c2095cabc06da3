"""What a model learns: targets from labels, the loss, and logits in the target's own unit."""

import math
from collections.abc import Sequence
from uuid import UUID

import torch
from torch import Tensor, nn

from shards.engine.window import Batch
from shards.errors import RecipeError
from shards.logits import Logits
from shards.manifest import Record
from shards.recipe import Recipe

Target = int | float
"""Place of the class; of a regression the number on the declared scale; nothing (0) for completion."""


def targets(recipe: Recipe, records: Sequence[Record]) -> dict[UUID, Target]:
    """Target of each record, from its label.

    Raises:
        RecipeError: a label is no declared class, or no number.
    """
    if recipe.task == "completion":
        return {record.record_id: 0 for record in records}
    if recipe.task == "regression":
        return {record.record_id: _number(recipe, record.label) for record in records}
    index = {label: place for place, label in enumerate(recipe.classes)}
    if not {record.label for record in records} <= set(index):  # which one is payload
        raise RecipeError(
            "classes: a record's label is not among them; correct or delete the record, or declare its class in a new "
            "recipe"
        )
    return {record.record_id: index[record.label] for record in records}


def loss(recipe: Recipe, logits: Tensor, wanted: Sequence[Target], batch: Batch | None = None) -> Tensor:
    """Mean loss of a batch: cross entropy over classes, squared error on the declared scale, or cross entropy over
    the tokens of the answers and their ends, which are in the batch itself.
    """
    device = logits.device
    if recipe.task == "regression":
        return nn.functional.mse_loss(logits.float()[:, 0], torch.tensor(wanted, dtype=torch.float32, device=device))
    if recipe.task == "completion":
        assert batch is not None  # noqa: S101 - a caller's mistake, not an input's
        following = answers_of(batch)
        return nn.functional.cross_entropy(logits.float(), following)
    return nn.functional.cross_entropy(logits.float(), torch.tensor(wanted, device=device))


def answers_of(batch: Batch) -> Tensor:
    """The tokens that follow the kept positions of a batch of prompts with answers, row by row."""
    ids = batch.inputs["input_ids"]
    return ids.roll(-1, 1)[batch.keep]


def in_units(recipe: Recipe, logits: Logits) -> Logits:
    """Logits in the target's own unit: a regression's times its spread, plus its offset."""
    if recipe.scale is None:
        return logits
    return logits * recipe.scale.spread + recipe.scale.offset


def _number(recipe: Recipe, label: str) -> float:
    """A label as a number on the declared scale; the message does not quote it, since it is payload."""
    try:
        number = float(label) if label.isascii() and "_" not in label else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RecipeError(
            "task: a label of this regression is no finite decimal number; correct or delete the record, or change "
            "the task"
        )
    scale = recipe.scale
    return number if scale is None else (number - scale.offset) / scale.spread
