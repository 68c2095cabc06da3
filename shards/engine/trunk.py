"""The trunk: base hidden states at stage boundaries, a pure function of each record, kept in memory only.

At stage i every layer below its block is still the base model's, so what enters the block is computed once
per record and shared by orders, epochs and stages. Derived data: never written anywhere, forgotten with the
record.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import torch
from torch import Tensor

from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.window import Batch, Window, same_bits
from shards.manifest import Record
from shards.recipe import Recipe

BATCH = 32
PROBES = 24


@dataclass(slots=True)
class _Features:
    content: bytes
    """Content digest of the record: the same id with another payload is computed again."""
    encoded: Encoded
    """Without the pixels of an image, which are many: they are decoded again from the source."""
    source: Record | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Boundary -> (length, width)."""


def boundaries(recipe: Recipe, depth: int) -> tuple[int, ...]:
    """Index of the lowest trained layer of stage 1, 2, ...: D - i * layers_per_slice."""
    return tuple(depth - i * recipe.layers_per_slice for i in range(1, recipe.slices + 1))


class Trunk:
    """Hidden states of records at stage boundaries. Not for use by several threads at once."""

    def __init__(self, backbone: Backbone, recipe: Recipe, cache_bytes: int = 2**30) -> None:
        """At most `cache_bytes` of hidden states are kept; beyond that they are computed per batch, to the
        same bits.
        """
        self.boundaries = boundaries(recipe, backbone.depth)
        self._backbone = backbone
        self._recipe = recipe
        self._window = Window(
            backbone.pure_replica(backbone.lengths[-1:], BATCH), backbone.layers, as_tuple=backbone.as_tuple
        )
        self._length = backbone.lengths[-1]
        self._cap = cache_bytes
        self.held_bytes = 0
        """Bytes of hidden states in memory."""
        self._features: dict[UUID, _Features] = {}
        self.batch = BATCH if self._is_pure() else 1
        """Rows per forward pass; 1 where the start-up probe saw a row depend on its neighbours."""

    @property
    def purity(self) -> str:
        """Result of the probe, for the platform fingerprint: `batched` or `single`."""
        return "batched" if self.batch > 1 else "single"

    def warm(self, records: Iterable[Record], boundary: int) -> None:
        """Encode the records and compute their hidden states at `boundary` (and the stage boundaries below
        it).
        """
        fresh: list[Record] = []
        here = list(records)
        for record in here:
            known = self._features.get(record.record_id)
            if known is None or known.content != record.content_digest:
                self.forget([record.record_id])
                fresh.append(record)
        for record, features in zip(fresh, self._begun(fresh), strict=True):
            self._features[record.record_id] = features
        waiting = [f for f in (self._features[record.record_id] for record in here) if boundary not in f.hidden]
        for feature, states in zip(waiting, self._computed(waiting, boundary), strict=False):
            if not self._keep(feature, states, boundary):
                break

    def rows(self, record_ids: Sequence[UUID], boundary: int) -> tuple[Tensor, Batch]:
        """Hidden states (rows, length, width) at `boundary` and inputs of warmed records, in this order.

        Images come without their pixels: above the boundary only the shape counts.
        """
        features = [self._features[record_id] for record_id in record_ids]
        absent = [feature for feature in features if boundary not in feature.hidden]
        states = self._computed(absent, boundary)
        computed = {id(feature): state[boundary] for feature, state in zip(absent, states, strict=True)}
        hidden = [computed.get(id(feature), feature.hidden.get(boundary)) for feature in features]
        batch = self._backbone.collate([feature.encoded for feature in features], self._length)
        return torch.stack([state for state in hidden if state is not None]), batch

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Drop all that is derived from these records."""
        for record_id in record_ids:
            if (gone := self._features.pop(record_id, None)) is not None:
                self.held_bytes -= sum(tensor.nbytes for tensor in gone.hidden.values())

    @property
    def record_ids(self) -> list[UUID]:
        """Records of which something is held."""
        return list(self._features)

    def clear(self) -> None:
        """Drop everything derived from records."""
        self._features.clear()
        self.held_bytes = 0

    def _begun(self, records: Sequence[Record]) -> list[_Features]:
        if self._recipe.input == "image":
            return [_Features(record.content_digest, Encoded(), record) for record in records]
        encoded = self._backbone.examples(self._recipe, records)
        return [_Features(record.content_digest, each) for record, each in zip(records, encoded, strict=True)]

    def _keep(self, feature: _Features, states: Mapping[int, Tensor], boundary: int) -> bool:
        """Store states, the wanted boundary first; other boundaries make room for it. False once it no longer
        fits.
        """
        need = states[boundary].nbytes
        if self.held_bytes + need > self._cap:
            for other in self._features.values():
                for index in [index for index in other.hidden if index != boundary]:
                    self.held_bytes -= other.hidden.pop(index).nbytes
        for index in sorted(states, key=lambda index: index != boundary):
            if self.held_bytes + states[index].nbytes <= self._cap:
                feature.hidden[index] = states[index]
                self.held_bytes += states[index].nbytes
        return boundary in feature.hidden

    def _computed(self, features: Sequence[_Features], boundary: int) -> Iterable[dict[int, Tensor]]:
        """Per feature its states at `boundary` and the stage boundaries below, begun at the highest one at
        hand.
        """
        wanted = [index for index in self.boundaries if index <= boundary]
        for at in range(0, len(features), self.batch):
            chunk = features[at : at + self.batch]
            start = max(set.intersection(*(set(feature.hidden) for feature in chunk)) & set(wanted), default=0)
            given = torch.stack([feature.hidden[start] for feature in chunk]) if start in chunk[0].hidden else None
            sources = [feature.source for feature in chunk if feature.source]
            whole = not start and sources
            encoded = self._backbone.examples(self._recipe, sources) if whole else [each.encoded for each in chunk]
            batch = self._backbone.collate(encoded, self._length)
            states = self._states(batch, [index for index in wanted if index >= start], start, given)
            for row in range(len(chunk)):
                yield {index: tensor[row].clone() for index, tensor in states.items()}

    def _states(self, batch: Batch, wanted: Sequence[int], start: int, hidden: Tensor | None) -> dict[int, Tensor]:
        with torch.no_grad(), self._backbone.autocast():
            return self._window.states(batch, wanted, start, hidden)

    def _is_pure(self) -> bool:
        """Whether a row has the same bits alone, among 24, moved among 32, and from a boundary upwards."""
        batch = self._backbone.made_up(PROBES, self._length)
        top, low = self.boundaries[0], self.boundaries[-1]
        mixed = self._states(batch, self.boundaries, 0, None)
        order = torch.arange(PROBES - 1, -9, -1) % PROBES
        moved = self._states(batch[order], [top], 0, None)[top]
        resumed = self._states(batch[:5].bare(), [top], low, mixed[low][:5])[top]
        alone = (self._states(batch[row : row + 1], [top], 0, None)[top] for row in range(PROBES))
        return (
            same_bits(moved, mixed[top][order])
            and same_bits(resumed, mixed[top][:5])
            and all(same_bits(state[0], mixed[top][row]) for row, state in enumerate(alone))
        )
