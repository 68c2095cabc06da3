"""`merged` aggregation in serving: the live shards' tensors as one member, as `shards.merged` does it for a file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from shards.engine.routed import Member


def merge_members(members: Sequence[Member]) -> Member:
    """One member whose LoRA update in every layer is the mean of the members' updates, and whose head is their mean.

    Copies the tensors: they are derived data and go with the predictor that holds them.
    """
    count = len(members)
    shapes = {name: (down.shape, up.shape) for member in members for name, (down, up) in member.lora.items()}
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (down_shape, up_shape) in shapes.items():
        like = next(member.lora[name][0] for member in members if name in member.lora)
        none = (like.new_zeros(down_shape), like.new_zeros(up_shape))
        pairs = [member.lora.get(name, none) for member in members]
        down = torch.cat([pair[0] for pair in pairs], dim=0)
        lora[name] = (down, torch.cat([pair[1] for pair in pairs], dim=1) / count)
    head = {
        name: torch.stack([member.head[name].double() for member in members]).mean(0).to(tensor.dtype)
        for name, tensor in members[0].head.items()
    }
    return Member(lora, head)
