"""Modules of a user, for engine `sisa`."""

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Two layers with dropout."""

    def __init__(self, width: int = 6, outputs: int = 2, inner: int = 12) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(0.2), nn.Linear(inner, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)


class Normed(nn.Module):
    """Running statistics, a buffer that no state_dict shows, a frozen parameter and tied weights."""

    offset: Tensor

    def __init__(self, width: int = 6, outputs: int = 2) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.again = nn.Linear(width, width)
        self.again.weight = self.first.weight
        self.fixed = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("offset", torch.randn(width), persistent=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        hidden = self.norm(self.first(rows)).relu() + self.offset * self.fixed
        return self.head(self.again(hidden))


class BatchBound(nn.Module):
    """An answer depends on the rows beside it."""

    def __init__(self, width: int = 6, outputs: int = 2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.norm(rows))


class Exploding(Plain):
    """The loss is not a number."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * float("nan")


class Wide(Plain):
    """One output too many."""

    def __init__(self, width: int = 6, outputs: int = 2) -> None:
        super().__init__(width, outputs + 1)


class Lazy(nn.Module):
    """Sized by the first data it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(2)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(rows)


class Talkative(Plain):
    """Its errors quote what it was given."""

    def forward(self, rows: Tensor) -> Tensor:
        raise ValueError(f"bad rows: {rows.tolist()}")


class NoModule:
    """Not a torch module."""


class Masked(Plain):
    """A constant buffer that is not finite, as masks are."""

    mask: Tensor

    def __init__(self, width: int = 6, outputs: int = 2) -> None:
        super().__init__(width, outputs)
        self.register_buffer("mask", torch.tensor([0.0] * (width - 1) + [float("-inf")]))

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows * self.mask.exp())
