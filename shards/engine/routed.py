"""Parts of the serving model that treat each member's rows with that member's own tensors."""

from collections.abc import Iterator, Mapping, Sequence
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

    def split(self, rows: int) -> Iterator[tuple[Member, slice]]:
        """Each member with its rows, of so many in all."""
        each = rows // max(1, len(self.members))
        for place, member in enumerate(self.members):
            yield member, slice(place * each, (place + 1) * each)


class RoutedLinear(nn.Module):
    """A frozen matrix for all rows, plus each member's adapter, where it has one here, on its own."""

    def __init__(self, base: nn.Module, route: Route, name: str) -> None:
        super().__init__()
        self.base = base
        self.route = route
        self.name = name
        self.shared: bool | None = None
        """Whether every member's rows are still the trunk's, so that one product serves all; found by the probe."""

    def __getattr__(self, name: str) -> Any:
        """What a model reads off the module it stands for, such as its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Like the module it stands for, on the rows of all members."""
        count = len(self.route.members)
        if self.shared is None and count > 1:
            self.shared = all(same_bits(part, hidden[: len(part)]) for part in hidden.chunk(count))
        if self.shared and count > 1:
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
