"""The next token of a growing text from several members at once, with what they have read of it kept in memory."""

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.engine.completion import NextLogits
from shards.engine.inputs import Encoded
from shards.engine.prompts import Prompts
from shards.engine.routed import Member
from shards.engine.skeleton import Skeleton
from shards.logits import Logits, mean_of_logits

_PROBED = 24
_remembering: weakref.WeakKeyDictionary[Skeleton, bool] = weakref.WeakKeyDictionary()


def next_logits(skeleton: Skeleton, members: Sequence[Member]) -> NextLogits:
    """What draws an answer from these members.

    Keys and values of the text so far are kept where the model's answers with them agree with those without, which is
    tried once; otherwise every step reads the whole text again.
    """
    if skeleton not in _remembering:
        _remembering[skeleton] = _remembers(skeleton)
    return Remembering(skeleton, members) if _remembering[skeleton] else Rereading(skeleton, members)


class Rereading:
    """Reads the whole text at every step, the trunk once for all members."""

    def __init__(self, skeleton: Skeleton, members: Sequence[Member]) -> None:
        self._skeleton = skeleton
        self._members = members

    def __call__(self, encoded: Encoded) -> NDArray[np.float32]:
        """Mean of the members' logits (vocabulary,) after this text."""
        prepared = self._skeleton.prepare_encoded([encoded], self._skeleton.starts(self._members))
        return mean_of_logits(self._skeleton.answer(self._members, prepared))[0]


class Remembering:
    """Reads what the text grew by since the last step; its keys and values go with this object.

    One text runs alone here, without padding, so its answer depends on no other.
    """

    def __init__(self, skeleton: Skeleton, members: Sequence[Member]) -> None:
        self._skeleton = skeleton
        self._members = members
        self._seen = 0
        self._memories: list[Any] = []

    def __call__(self, encoded: Encoded) -> NDArray[np.float32]:
        """Mean of the members' logits (vocabulary,) after this text, which continues the one of the last step."""
        found: list[Logits] = []
        while self._seen < len(encoded.ids):
            end = self._seen + 1 if self._seen else len(encoded.ids)  # state space layers go on by one token only
            grown = encoded.ids[self._seen : end]
            found = self._skeleton.following(self._members, grown, self._seen, self._memories)
            self._seen = end
        return mean_of_logits(found)[0]


def _remembers(skeleton: Skeleton) -> bool:
    """Whether a made-up text has the same next tokens, up to rounding, read piece by piece and read whole."""
    codec = skeleton.backbone.codec
    assert isinstance(codec, Prompts)  # noqa: S101 - nothing else completes
    length = min(_PROBED, codec.lengths[-1] - 1)
    ids = codec.made_up(1, length + 1)[0].ids
    members = skeleton.made_up(2)
    by_piece, whole = Remembering(skeleton, members), Rereading(skeleton, members)
    tolerance = 1e-3 if skeleton.recipe.precision == "float32" else 5e-2
    try:
        for size in (length - 3, length - 2, length - 1, length):
            text = Encoded(ids[:size], answer=size)
            piece, full = by_piece(text), whole(text)
            if np.abs(piece - full).max() > tolerance * np.abs(full).max():
                return False
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # a kind of model that keeps something else than keys and values
    return True
