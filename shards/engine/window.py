"""Running a part of a transformer: from the hidden state at one layer boundary to another, or to the logits.

One mechanism for every kind of backbone: layers outside the window are replaced by modules that hand their
input on, and the layer at its lower edge has its input swapped for the given hidden state. The model's own
forward still makes the masks, rotary tables and head, so nothing here knows an architecture.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids and attention mask, both (rows, length) int64."""

    ids: Tensor
    mask: Tensor

    def __getitem__(self, rows: Any) -> "Tokens":
        """Some of the rows."""
        return Tokens(self.ids[rows], self.mask[rows])


class _Skip(nn.Module):
    def __init__(self, window: "Window", index: int) -> None:
        super().__init__()
        self.window = window
        self.index = index

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        hidden = self.window.enter(self.index, hidden)
        return (hidden,) if self.window.as_tuple else hidden


class Window:
    """A model whose forward may begin above given hidden states. Holds state between calls: one thread at a
    time.
    """

    def __init__(self, model: nn.Module, layers: str, *, as_tuple: bool) -> None:
        """`layers` is the path of the layer list in `model`; `as_tuple` whether its layers return tuples."""
        self.model = model
        self.as_tuple = as_tuple
        self._list: Any = model.get_submodule(layers)
        self._layers = list(self._list)
        self._skips = [_Skip(self, index) for index in range(len(self._layers))]
        self._span = (0, len(self._layers))
        self._hidden: Tensor | None = None
        self._wanted: Collection[int] = ()
        self._seen: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def logits(self, tokens: Tokens, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Logits (rows, classes) from the hidden state at boundary `start`, or from the tokens alone."""
        return self._run(tokens, (start, self.depth), hidden).logits

    def states(
        self, tokens: Tokens, wanted: Collection[int], start: int = 0, hidden: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Hidden states (rows, length, width) at the `wanted` boundaries (input of the layer of that index).

        Only the layers up to the highest of them run.
        """
        self._wanted, self._seen = wanted, {}
        try:
            self._run(tokens, (start, max(wanted)), hidden)
            return self._seen
        finally:
            self._wanted, self._seen = (), {}

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden state that layer `index` gets in place of `hidden`."""
        if self._hidden is not None and index == self._span[0]:
            hidden = self._hidden
        if index in self._wanted:
            self._seen[index] = hidden
        return hidden

    def _run(self, tokens: Tokens, span: tuple[int, int], hidden: Tensor | None) -> Any:
        self._open(span)
        self._hidden = hidden
        try:
            return self.model(input_ids=tokens.ids, attention_mask=tokens.mask)
        finally:
            self._hidden = None

    def _open(self, span: tuple[int, int]) -> None:
        if span == self._span:
            return
        for index, layer in enumerate(self._layers):
            self._list[index] = layer if span[0] <= index < span[1] else self._skips[index]
        self._span = span

    def _hook(self, index: int) -> Any:
        def swap(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self.enter(index, args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": self.enter(index, kwargs["hidden_states"])}

        return swap


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))
