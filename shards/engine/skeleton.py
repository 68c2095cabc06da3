"""The serving model: one copy of the backbone that answers for several members at once.

The trunk runs once per input; above it the rows are repeated per member, every frozen matrix is multiplied
once for all of them, and each member's adapters and head act on its own rows. Members are plain tensors
handed in per call, so exchanging what is served copies no weight.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.merged import merge_members
from shards.engine.routed import Member, Route, RoutedHead, RoutedLinear, replace_module
from shards.engine.structure import targets
from shards.engine.tasks import in_units
from shards.engine.trunk import boundaries
from shards.engine.window import Batch, Window, same_bits
from shards.logits import Logits
from shards.recipe import Recipe

SEQUENCES = 32
"""Rows times members per pass; beyond it activations leave the cache (facts/training.md, section 4)."""
MEMBERS = 8
"""Members per pass."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one padded length that go through the layers together."""

    rows: slice
    places: Sequence[int]
    """Where each row stands among the caller's inputs."""
    batch: Batch
    hidden: Tensor
    """(rows, length, width) at the lowest trained layer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs as the trunk leaves them, for any members to answer. Derived from the inputs: it has to go with them."""

    count: int
    passes: tuple[Pass, ...]


class Skeleton:
    """Answers inputs for any members of a recipe. One pass at a time: a lock makes concurrent callers wait."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load the backbone unless it is given, and check at start-up that answers depend on their input
        alone.

        Raises:
            BackboneError: see `Backbone.load`.
            RecipeError: the LoRA targets are not in the backbone, or see `Backbone.load`.
        """
        self.recipe = recipe
        self.digest = recipe.digest
        self.backbone = backbone or Backbone.load(recipe, device)
        self.floor = boundaries(recipe, self.backbone.depth)[-1]
        self._lengths = self.backbone.lengths
        self._route = Route()
        self._lock = threading.Lock()
        model = self.backbone.pure_replica(self._lengths, SEQUENCES)
        self._shapes = self._install(model)
        self._window = Window(model, self.backbone.layers, as_tuple=self.backbone.as_tuple)
        self.batched = True
        self.batched = self._is_pure()

    @property
    def purity(self) -> str:
        """Result of the start-up probe: `batched`, or `single` (each input and member runs alone)."""
        return "batched" if self.batched else "single"

    def logits(self, members: Sequence[Member], inputs: Sequence[Input]) -> list[Logits]:
        """Per member the logits (inputs, outputs) of each input.

        Each answer's bits depend on that input and member alone: not on its neighbours, nor on the other
        members.
        """
        return self.answer(members, self.prepare(inputs, len(members)))

    def prepare(self, inputs: Sequence[Input], members: int = 1) -> Prepared:
        """Take inputs through the trunk, in passes that suit so many members at once.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        with self._lock:  # tokenizers keep their cutting length as state
            encoded = self.backbone.encode(inputs)
        return self.prepare_encoded(encoded, members)

    def prepare_encoded(self, encoded: Sequence[Encoded], members: int = 1) -> Prepared:
        """Take encoded inputs through the trunk."""
        by_length: dict[int, list[int]] = {}
        for place, each in enumerate(encoded):
            own = self.backbone.length(each)
            by_length.setdefault(next(b for b in self._lengths if b >= own), []).append(place)
        passes: list[Pass] = []
        for length, places in sorted(by_length.items()):
            batch = self.backbone.collate([encoded[place] for place in places], length)
            with self._lock:
                passes += [replace(each, places=places[each.rows]) for each in self._trunk(batch, members)]
        return Prepared(len(encoded), tuple(passes))

    def answer(self, members: Sequence[Member], prepared: Prepared) -> list[Logits]:
        """Per member the logits (inputs, outputs) of prepared inputs; the bits are those of `logits`."""
        answers = [np.zeros((prepared.count, self.backbone.outputs), np.float32) for _ in members]
        for each in prepared.passes:
            with self._lock:
                found = self._upper(members, each)
            for answer, logits in zip(answers, found, strict=True):
                answer[each.places] = in_units(self.recipe, logits.numpy())
        return answers

    def _install(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Replace adapter targets and heads by routed ones; per target the widths (in, out)."""
        shapes = targets(model, self.backbone.layers, self.recipe, self.floor)
        for name, module in list(model.named_modules()):
            lowest = self.backbone.layer_index(name) == self.floor  # for `shared`: its input may be the trunk's
            if name in shapes or (lowest and isinstance(module, nn.Linear)):
                replace_module(model, name, RoutedLinear(module, self._route, name))
            elif name in self.backbone.heads:
                replace_module(model, name, RoutedHead(module, self._route, name))
        return shapes

    def _group(self, members: int) -> int:
        return min(MEMBERS, max(1, members)) if self.batched else 1

    def _trunk(self, batch: Batch, members: int) -> Iterator[Pass]:
        """Hidden states at the lowest trained layer, in passes of few fixed sizes."""
        for rows in _passes(batch.rows, self._group(members), batched=self.batched):
            with torch.inference_mode(), self.backbone.autocast():
                hidden = self._window.states(batch[rows], [self.floor])[self.floor]
            yield Pass(rows, (), batch[rows].bare(), hidden)

    def _upper(self, members: Sequence[Member], given: Pass) -> list[Tensor]:
        """Per member its logits (rows, classes), from the trunk's hidden state."""
        found: list[Tensor] = []
        group = self._group(len(members))
        try:
            for at in range(0, len(members), group):
                self._route.members = members[at : at + group]
                count = len(self._route.members)
                with torch.inference_mode(), self.backbone.autocast():
                    logits = self._window.logits(
                        given.batch.repeat(count), self.floor, given.hidden.repeat(count, 1, 1)
                    )
                found += logits.float().cpu().chunk(count)
        finally:
            self._route.members = ()  # kept, they would outlive their erasure until the next pass
        return found

    def following(self, members: Sequence[Member], ids: Sequence[int], seen: int, memories: list[Any]) -> list[Logits]:
        """Per member the logits (1, vocabulary) of the token after `ids`, of a text of which `seen` ids went before.

        `memories` holds keys and values of that text, an empty list at its begin; it is derived from the text.
        """
        group = self._group(len(members))
        cuts = range(0, len(members), group)
        if not memories:
            memories += [DynamicCache(config=cast("Any", self.backbone.model).config) for _ in cuts]
        given = torch.tensor([list(ids)], device=self.backbone.device)
        found: list[Tensor] = []
        with self._lock:
            try:
                for at, memory in zip(cuts, memories, strict=True):
                    self._route.members = members[at : at + group]
                    count = len(self._route.members)
                    with torch.inference_mode(), self.backbone.autocast():
                        logits = self._window.following(given, seen, memory, (self.floor, count))
                    found += logits.float().cpu().chunk(count)
            finally:
                self._route.members = ()
        return [logits.numpy() for logits in found]

    def made_up(self, count: int) -> list[Member]:
        """Members of no training, the same in every process, for probes."""
        return [self._made_up(self._shapes, seed) for seed in range(count)]

    def _is_pure(self) -> bool:
        """Whether logits keep their bits alone, among others, moved, and beside any number of members."""
        members = self.made_up(min(MEMBERS, self.recipe.shards))
        if self.recipe.aggregation == "merged":
            members = [merge_members(self.made_up(self.recipe.shards))]
        for length in {self._lengths[0], self._lengths[-1]}:
            full = self.backbone.made_up(SEQUENCES, length)
            batch, order = full[:13], torch.arange(12, -1, -1)
            together = self._tensors(members, batch)
            moved = self._tensors(members[::-1], batch[order])[::-1]
            many = self._tensors(members[:1], full)[0]  # one member's passes have the most rows
            fewer = self._tensors(members[:1], full[:18])[0]  # 16 and 2
            alone = [self._tensors(members[-1:], batch[row : row + 1])[0] for row in range(3)]
            if not (
                all(same_bits(there[order], here) for there, here in zip(together, moved, strict=True))
                and same_bits(many[:13], together[0])
                and same_bits(many[:18], fewer)
                and all(same_bits(logits, together[-1][row : row + 1]) for row, logits in enumerate(alone))
            ):
                return False
        return True

    def _tensors(self, members: Sequence[Member], batch: Batch) -> list[Tensor]:
        passes = [self._upper(members, each) for each in self._trunk(batch, len(members))]
        return [torch.cat(parts) for parts in zip(*passes, strict=True)]

    def _made_up(self, shapes: Mapping[str, tuple[int, int]], seed: int) -> Member:
        generator = torch.Generator().manual_seed(seed)
        rank, device = self.recipe.lora.rank, self.backbone.device

        def draw(*size: int) -> Tensor:
            return torch.empty(size).normal_(0.0, 0.05, generator=generator).to(device)

        dtype = self.backbone.precision
        lora = {name: (draw(rank, wide).to(dtype), draw(out, rank).to(dtype)) for name, (wide, out) in shapes.items()}
        own = tuple(name + "." for name in self.backbone.heads)
        untrained = self.backbone.model.named_parameters()
        head = {name: draw(*tensor.shape) for name, tensor in untrained if name.startswith(own)}
        return Member(lora, head)


def _passes(rows: int, group: int, *, batched: bool) -> Iterator[slice]:
    """Cut rows into powers of two, the largest such that rows times members stays near `SEQUENCES`."""
    at = 0
    most = 2 ** int(math.log2(max(1, SEQUENCES // group))) if batched else 1
    while at < rows:
        size = min(most, 2 ** int(math.log2(rows - at)))
        yield slice(at, at + size)
        at += size
