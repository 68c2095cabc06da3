"""Linear layers whose bits do not depend on how many rows they multiply at once."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HEAD_ROWS = 16
"""Matrix products with fewer rows take another kernel in MKL and give other bits (facts/training.md, section
1).
"""


class RowLinear(nn.Linear):
    """A linear layer outside the layer list (pooler, head); never multiplies fewer than `HEAD_ROWS` rows."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Like `nn.Linear`; (rows, in) inputs are filled up with zero rows to a multiple of `HEAD_ROWS`."""
        if input.dim() != 2 or not (short := -input.shape[0] % HEAD_ROWS):
            return super().forward(input)
        return super().forward(nn.functional.pad(input, (0, 0, 0, short)))[: input.shape[0]]


class SequenceLinear(nn.Linear):
    """A linear layer that multiplies one sequence at a time, so that its bits do not depend on how many there
    are.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Like `nn.Linear`, for (rows, length, in)."""
        return torch.stack([super(SequenceLinear, self).forward(row) for row in input.to(self.weight.dtype)])


def pin(model: nn.Module, layers: str, precision: torch.dtype) -> None:
    """Make few-row products safe, and round frozen matrices to the autocast precision once instead of at each
    call.
    """
    for name, module in list(model.named_modules()):
        if name.startswith(layers + "."):
            if precision is not torch.float32 and isinstance(module, nn.Linear | Conv1D):
                module.to(precision)
        elif type(module) is nn.Linear:
            exchange(model, name, module, RowLinear)


def exchange(model: nn.Module, name: str, linear: nn.Linear, kind: type[nn.Linear]) -> None:
    """Put another kind of linear layer over the same weights."""
    has_bias = "bias" in dict(linear.named_parameters())
    other = kind(linear.in_features, linear.out_features, bias=has_bias, device="meta")
    other.weight, other.bias = linear.weight, linear.bias
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, other)


@torch.no_grad()
def depends_on_rows(linear: nn.Linear, length: int, rows: int) -> bool:
    """Whether a sequence of `length` gets other bits among fewer than `rows` sequences."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.empty(rows, length, linear.in_features).normal_(generator=generator).to(linear.weight)
    together = linear(sample)
    fewer = [count for count in (1, 2, 3, 4, 5, 6, 8, 11, 12, 16, 23, 24) if count < rows]
    return not all(torch.equal(linear(sample[:count]), together[:count]) for count in fewer)
