"""Rows of numbers as input: what a module of the user's own is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.window import Batch
from shards.errors import InputError
from shards.vectors import VectorError, parsed


class Vectors:
    """Rows of so many numbers, each a JSON array; to the codec that is their length."""

    def __init__(self, width: int, device: torch.device) -> None:
        """For one width and device."""
        self.lengths: tuple[int, ...] = (width,)
        self._device = device

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Each array as float32 (width,).

        Raises:
            InputError: an input is no array of finite numbers, or has another width.
        """
        return [Encoded(pixels=_numbers(text, self.lengths[0])) for text in inputs]

    def length(self, encoded: Encoded) -> int:  # noqa: ARG002 - every row has the same
        """The width."""
        return self.lengths[0]

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:
        """Float32 (rows, width)."""
        rows = [torch.zeros(length) if each.pixels is None else each.pixels for each in encoded]
        return Batch({"vector": torch.stack(rows).to(self._device)})

    def made_up(self, rows: int, length: int) -> list[Encoded]:
        """Random numbers."""
        generator = torch.Generator().manual_seed(0)
        return [Encoded(pixels=torch.randn(length, generator=generator)) for _ in range(rows)]


def _numbers(text: Input, width: int) -> Tensor:
    try:
        return torch.from_numpy(parsed(text, width))
    except VectorError as error:
        raise InputError(f"input: {error}") from None
