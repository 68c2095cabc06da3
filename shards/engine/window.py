"""Running a part of a transformer: from the hidden state at one layer boundary to another, or to the logits.

One mechanism for every kind of backbone: layers outside the window are replaced by modules that hand their
input on, and the layer at its lower edge has its input swapped for the given hidden state. The model's own
forward still makes the masks, rotary tables and head, so nothing here knows an architecture.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


@dataclass(frozen=True, slots=True)
class Batch:
    """What the model's forward takes of some inputs: tensors whose first dimension is the row."""

    inputs: Mapping[str, Tensor]
    """Keyword arguments: `input_ids` and `attention_mask` (rows, length), or `pixel_values` (rows, channels, height,
    width).
    """
    keep: Tensor | None = None
    """Of a causal language model: (rows, length) bool, the positions whose next token is asked for."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return next(iter(self.inputs.values())).shape[0]

    def __getitem__(self, rows: Any) -> "Batch":
        """Some of the rows."""
        keep = None if self.keep is None else self.keep[rows]
        return Batch({name: tensor[rows] for name, tensor in self.inputs.items()}, keep)

    def repeat(self, count: int) -> "Batch":
        """All rows, `count` times over."""
        keep = None if self.keep is None else _repeated(self.keep, count)
        return Batch({name: _repeated(tensor, count) for name, tensor in self.inputs.items()}, keep)

    def bare(self) -> "Batch":
        """The rows as they are needed above the trunk: pixels, of which only the shape counts there, left empty."""
        if (pixels := self.inputs.get("pixel_values")) is None:
            return self
        return Batch({**self.inputs, "pixel_values": pixels.new_zeros(()).expand(pixels.shape)}, self.keep)


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat(count, *[1] * (tensor.dim() - 1))


class _Skip(nn.Module):
    def __init__(self, window: "Window", index: int, layer: nn.Module) -> None:
        super().__init__()
        self.window = window
        self.index = index
        object.__setattr__(self, "_layer", layer)  # not as a module of this one: its weights are not here

    def __getattr__(self, name: str) -> Any:
        """Settings that a model reads off its layers (ModernBERT: `attention_type`)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        hidden = self.window.enter(self.index, hidden)
        return (hidden, None) if self.window.as_tuple else hidden


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
        self._skips = [_Skip(self, index, layer) for index, layer in enumerate(self._layers)]
        self._span = (0, len(self._layers))
        self._hidden: Tensor | None = None
        self._wanted: Collection[int] = ()
        self._seen: dict[int, Tensor] = {}
        self._keep: Tensor | None = None
        self._fork: tuple[int, int] | None = None
        self._entry: nn.Module | None = None
        self._entry_dtype: torch.dtype | None = None
        if hasattr(model, "get_output_embeddings") and (last := cast("Any", model).get_output_embeddings()) is not None:
            last.register_forward_pre_hook(self._kept)
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self._layers)

    def learn_entry(self, batch: Batch) -> None:
        """Find the module whose output is the first layer's input as it is, the embeddings: from now on it is passed
        over where a hidden state takes the place of what it makes. Not while training: its dropout draws numbers.
        """
        made: dict[int, tuple[Tensor, nn.Module]] = {}
        found: list[tuple[Tensor, nn.Module]] = []

        def note(module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[id(output)] = (output, module)  # of nested modules the outermost

        def compare(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs["hidden_states"]
            if id(given) in made:
                found.append(made[id(given)])

        first = self._layers[0].register_forward_pre_hook(compare, with_kwargs=True, prepend=True)
        with register_module_forward_hook(note), first:
            self.states(batch, {1})
        for output, module in found:
            self._entry, self._entry_dtype = module, output.dtype

    def logits(self, batch: Batch, start: int = 0, hidden: Tensor | None = None) -> Tensor:
        """Logits from the hidden state at boundary `start`, or from the inputs alone: (rows, outputs); of a causal
        language model (kept positions, vocabulary), row by row.
        """
        return self._run(batch, (start, self.depth), hidden).logits

    def states(
        self, batch: Batch, wanted: Collection[int], start: int = 0, hidden: Tensor | None = None
    ) -> dict[int, Tensor]:
        """Hidden states (rows, length, width) at the `wanted` boundaries (input of the layer of that index).

        Only the layers up to the highest of them run.
        """
        self._wanted, self._seen = wanted, {}
        none = None if batch.keep is None else torch.zeros_like(batch.keep)  # nobody asks for logits
        try:
            self._run(Batch(batch.inputs, none), (start, max(wanted)), hidden)
            return self._seen
        finally:
            self._wanted, self._seen = (), {}

    def following(self, ids: Tensor, seen: int, memory: Any, fork: tuple[int, int]) -> Tensor:
        """Logits (rows, vocabulary) of the token after `ids` (1, length), which come after `seen` others whose keys and
        values are in `memory`, a cache of transformers. From the layer `fork[0]` on, the one row is `fork[1]` rows.
        """
        self._open((0, self.depth))
        length = ids.shape[1]
        self._fork = fork
        self._keep = (torch.arange(length, device=ids.device) == length - 1).expand(fork[1], -1)
        mask = torch.ones(1, seen + length, dtype=torch.int64, device=ids.device)
        try:
            return self.model(input_ids=ids, attention_mask=mask, past_key_values=memory, use_cache=True).logits
        finally:
            self._fork = self._keep = None

    def enter(self, index: int, hidden: Tensor) -> Tensor:
        """The hidden state that layer `index` gets in place of `hidden`."""
        if self._fork is not None and index == self._fork[0]:
            return hidden.repeat(self._fork[1], 1, 1)
        if self._hidden is not None and index == self._span[0]:
            hidden = self._hidden
        if index in self._wanted:
            self._seen[index] = hidden
        return hidden

    def _run(self, batch: Batch, span: tuple[int, int], hidden: Tensor | None) -> Any:
        self._open(span)
        self._hidden, self._keep = hidden, batch.keep
        entry = None if hidden is None or hidden.dtype != self._entry_dtype or self.model.training else self._entry
        if entry is not None:
            entry.forward = lambda *_args, **_kwargs: hidden
        try:
            return self.model(**batch.inputs)
        finally:
            self._hidden = self._keep = None
            if entry is not None:
                del entry.forward

    def _open(self, span: tuple[int, int]) -> None:
        if span == self._span:
            return
        for index, layer in enumerate(self._layers):
            self._list[index] = layer if span[0] <= index < span[1] else self._skips[index]
        self._span = span

    def _kept(self, _last: nn.Module, args: tuple[Any, ...]) -> Any:
        """Only the wanted positions meet the vocabulary, as rows (kept, width)."""
        return args if self._keep is None else (args[0][self._keep],)

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
