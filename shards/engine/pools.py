"""Features of engine `ridge`: mean pools of the frozen backbone's last layers, a pure function of each input."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.window import Batch
from shards.errors import BackboneError
from shards.recipe import Recipe, Ridge
from shards.sums import Features, Grid

Pooled = npt.NDArray[np.float32]
"""(inputs, layers * width)."""
BATCH = 32
"""Most rows per pass; passes have powers of two, so that the probe can meet every size."""
CHUNK = 128
"""Inputs that are decoded at a time; an image's pixels take half a megabyte and more."""
PROBES = 2 * BATCH - 1
"""32 + 16 + .. + 1: in reverse order, the first 31 move from the largest passes to those of every smaller size."""


class Pools:
    """Pools and features of inputs. Safe to use from several threads; passes run one at a time."""

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        """Check at start-up that an input's pools do not depend on its neighbours.

        Raises:
            BackboneError: it has fewer layers than the recipe's features need.
        """
        layers = (recipe.ridge or Ridge()).layers
        if layers > backbone.depth:
            raise BackboneError(
                f"ridge.layers is {layers}, the backbone has {backbone.depth} layers: lower ridge.layers"
            )
        self.grid = Grid.of(recipe)
        self._backbone = backbone
        self._lock = threading.Lock()
        self._seen: dict[int, Tensor] = {}
        self._model = backbone.pure_replica(backbone.lengths, BATCH)
        own = list(self._model.get_submodule(backbone.layers))
        for index in range(backbone.depth - layers, backbone.depth):
            own[index].register_forward_hook(self._hook(index))
        self._most = BATCH
        self.width = self._pooled(backbone.made_up(1, backbone.lengths[0])).shape[1] + 1
        """Number of features, the constant included."""
        self._most = BATCH if self._is_pure() else 1

    @property
    def purity(self) -> str:
        """Result of the probe, for the platform fingerprint: `batched` or `single` (each input runs alone)."""
        return "batched" if self._most > 1 else "single"

    def features(self, inputs: Sequence[Input]) -> Features:
        """Features (inputs, width), each row a function of its input alone.

        Raises:
            RecipeError: an input is not what the recipe says.
            ShardsError: the backbone gives numbers that are not finite.
        """
        chunks = (inputs[at : at + CHUNK] for at in range(0, len(inputs), CHUNK))
        pooled = [self._pools([each for _, each in self.encode(chunk)]) for chunk in chunks]
        return self.grid.features(np.concatenate([np.zeros((0, self.width - 1), np.float32), *pooled]))

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input as the backbone takes it, with the length that it is filled up to, which its own decides.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        with self._lock:  # tokenizers keep their cutting length as state
            encoded = self._backbone.encode(inputs)
        return [(self._length(each), each) for each in encoded]

    def features_of(self, encoded: Sequence[Encoded]) -> Features:
        """Features of encoded inputs, to the same bits.

        Raises:
            ShardsError: the backbone gives numbers that are not finite.
        """
        return self.grid.features(self._pools(encoded))

    def _length(self, encoded: Encoded) -> int:
        own = self._backbone.length(encoded)
        return next(length for length in self._backbone.lengths if length >= own)

    def _pools(self, encoded: Sequence[Encoded]) -> Pooled:
        by_length: dict[int, list[int]] = {}
        for place, each in enumerate(encoded):
            by_length.setdefault(self._length(each), []).append(place)
        pooled = np.zeros((len(encoded), self.width - 1), np.float32)
        for length, places in sorted(by_length.items()):
            for rows in _passes(len(places), self._most):
                batch = self._backbone.collate([encoded[place] for place in places[rows]], length)
                pooled[places[rows]] = self._pooled(batch)
        return pooled

    def _pooled(self, batch: Batch) -> Pooled:
        mask = batch.inputs.get("attention_mask")
        with self._lock, torch.inference_mode(), self._backbone.autocast():
            try:
                self._model(**batch.inputs)
                # Row by row over its own positions: the sum's order then knows nothing of padding and neighbours.
                own = [slice(None) if mask is None else mask[row].bool() for row in range(batch.rows)]
                layers = [self._seen[index] for index in sorted(self._seen)]
                rows = [torch.cat([_mean(hidden[row, kept]) for hidden in layers]) for row, kept in enumerate(own)]
            finally:
                self._seen.clear()
            return torch.stack(rows).float().cpu().numpy()

    def _hook(self, index: int) -> Any:
        def keep(_layer: Any, _given: Any, output: Any) -> None:
            self._seen[index] = output[0] if self._backbone.as_tuple else output

        return keep

    def _is_pure(self) -> bool:
        """Whether pools keep their bits alone, moved, and in passes of other sizes."""
        for length in {self._backbone.lengths[0], self._backbone.lengths[-1]}:
            batch = self._backbone.made_up(PROBES, length)
            together = self._in_passes(batch)
            moved = self._in_passes(batch[torch.arange(PROBES - 1, -1, -1)])[::-1]
            alone = np.concatenate([self._pooled(batch[row : row + 1]) for row in range(5)])
            if together.tobytes() != moved.tobytes() or alone.tobytes() != together[:5].tobytes():
                return False
        return True

    def _in_passes(self, batch: Batch) -> Pooled:
        return np.concatenate([self._pooled(batch[rows]) for rows in _passes(batch.rows, self._most)])


def _mean(tokens: Tensor) -> Tensor:
    """Mean over positions (n, width); zeros for a text of which the tokenizer leaves none."""
    return tokens.double().sum(0) / max(1, len(tokens))


def _passes(rows: int, most: int) -> Iterator[slice]:
    """Cut rows into the largest powers of two up to `most`."""
    at = 0
    while at < rows:
        size = min(most, 2 ** ((rows - at).bit_length() - 1))
        yield slice(at, at + size)
        at += size
