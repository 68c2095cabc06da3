"""Parts of the serving model that treat each member's rows with that member's own tensors."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shards.engine.window import same_bits


@dataclass(frozen=True, slots=True)
class Member:
    """Tensors of one stage with its ancestors, ready to serve."""

    lora: Mapping[str, tuple[Tensor, Tensor]]
    """By module path: A (rank, in) and B (out, rank) times the LoRA scale, both in the serving precision."""
    head: Mapping[str, Tensor]
    """By path in the model: the head's parameters, float32."""


class Route:
    """Whose rows are whose in the pass under way."""

    members: Sequence[Member] = ()
    start: int = 0
    """The layer that the members' rows enter at, all of them with the base model's hidden state."""
    learns: bool = False
    apart: bool = False
    """Whether a module with adapters was seen to get rows that are nobody's own: members cannot share a pass then."""

    @contextmanager
    def of(self, members: Sequence[Member], start: int) -> Generator[None]:
        """A pass of these members from the layer `start` on."""
        self.members, self.start = members, start
        try:
            yield
        finally:
            self.members = ()  # kept, they would outlive their erasure until the next pass

    @contextmanager
    def learning(self) -> Generator[None]:
        """A pass that shows which modules of its first layer get the same rows for every member."""
        self.learns = True
        try:
            yield
        finally:
            self.learns = False

    def split(self, rows: int) -> Iterator[tuple[Member, slice]]:
        """Each member with its rows, of so many in all."""
        each = rows // max(1, len(self.members))
        for place, member in enumerate(self.members):
            yield member, slice(place * each, (place + 1) * each)


class RoutedLinear(nn.Module):
    """A frozen matrix for all rows, plus each member's adapter, where it has one here, on its own."""

    def __init__(self, base: nn.Module, route: Route, name: str, layer: int | None) -> None:
        super().__init__()
        self.base = base
        self.route = route
        self.name = name
        self.layer = layer
        self.shared = False
        """Whether in the layer that members start at their rows are still the base model's here, so that one product
        serves all: true of queries, keys and values. Learnt once at start-up from members that differ.
        """

    def __getattr__(self, name: str) -> Any:
        """What a model reads off the module it stands for, such as its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Like the module it stands for, on the rows of all members."""
        count = len(self.route.members)
        if count > 1 and hidden.shape[0] % count:  # DeBERTa's relative positions: one input, for everybody's rows
            self.route.apart |= any(self.name in member.lora for member in self.route.members)
            return self.base(hidden)
        first = count > 1 and self.layer == self.route.start
        if first and self.route.learns:
            self.shared = all(same_bits(part, hidden[: len(part)]) for part in hidden.chunk(count))
        if first and self.shared:
            out = self.base(hidden[: hidden.shape[0] // count])
            out = out.repeat(count, *[1] * (out.dim() - 1))
        else:
            out = self.base(hidden)
        for member, rows in self.route.split(hidden.shape[0]):
            if (pair := member.lora.get(self.name)) is not None:
                down, up = pair
                low = nn.functional.linear(hidden[rows], down)
                part = out[rows].view(-1, out.shape[-1])
                part.addmm_(low.view(-1, low.shape[-1]), up.t())
        return out


class RoutedHead(nn.Module):
    """Each member's own head on its own rows; without members the untrained one (its output is not used)."""

    def __init__(self, template: nn.Module, route: Route, name: str) -> None:
        super().__init__()
        self.template = template
        self.route = route
        self.prefix = name + "."

    def forward(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Like the module it stands for, on the rows of all members."""
        if not self.route.members:
            return self.template(rows, *args, **kwargs)
        parts = [
            functional_call(self.template, self._own(member), (rows[part], *args), kwargs)
            for member, part in self.route.split(rows.shape[0])
        ]
        return torch.cat(parts)

    def _own(self, member: Member) -> dict[str, Tensor]:
        size = len(self.prefix)
        return {name[size:]: tensor for name, tensor in member.head.items() if name.startswith(self.prefix)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put another module in a path's place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
