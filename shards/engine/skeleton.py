"""The serving model: one copy of the backbone that answers for several members at once.

The trunk runs once per input; above it the rows are repeated per member, every frozen matrix is multiplied
once for all of them, and each member's adapters and head act on its own rows. Members are plain tensors
handed in per call, so exchanging what is served copies no weight.

A member whose prefix is short begins higher: below its lowest block its layers are still the base model's, which the
trunk's pass has computed for all of them.
"""

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.memory import is_shortage
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
    """Rows of one padded length that go through the trunk together."""

    places: Sequence[int]
    """Where each row stands among the caller's inputs."""
    batch: Batch
    hidden: Mapping[int, Tensor]
    """(rows, length, width) of the base model, by boundary."""


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
        self._coding = threading.Lock()
        """Tokenizers keep their cutting length as state."""
        model = self.backbone.pure_replica(self._lengths, SEQUENCES)
        self._shapes = self._install(model)
        self._layer_of = {name: self.backbone.layer_index(name) or 0 for name in self._shapes}
        self._window = Window(model, self.backbone.layers, as_tuple=self.backbone.as_tuple)
        self.batched = True
        self._learn()
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
        return self.answer(members, self.prepare(inputs, self.starts(members)))

    def starts(self, members: Sequence[Member]) -> frozenset[int]:
        """The lowest layers that members have adapters in: below them they are the base model."""
        return frozenset(map(self._start, members))

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input as the model takes it, with the length that it is filled up to: a function of it alone.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        with self._coding:
            encoded = self.backbone.encode(inputs)
        return [(self._length(each), each) for each in encoded]

    def prepare(self, inputs: Sequence[Input], starts: Collection[int] = ()) -> Prepared:
        """Take inputs through the trunk, see `prepare_encoded`.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        return self.prepare_encoded([each for _, each in self.encode(inputs)], starts)

    def prepare_encoded(self, encoded: Sequence[Encoded], starts: Collection[int] = ()) -> Prepared:
        """Take encoded inputs through the base model's layers once, for members that start there; without `starts`
        for members of any depth.
        """
        by_length: dict[int, list[int]] = {}
        for place, each in enumerate(encoded):
            by_length.setdefault(self._length(each), []).append(place)
        passes: list[Pass] = []
        for length, places in sorted(by_length.items()):
            batch = self.backbone.collate([encoded[place] for place in places], length)
            with self._lock:
                passes += self._trunk(batch, places, starts or {self.floor})
        return Prepared(len(encoded), tuple(passes))

    def answer(self, members: Sequence[Member], prepared: Prepared) -> list[Logits]:
        """Per member the logits (inputs, outputs) of prepared inputs; the bits are those of `logits`."""
        answers = [np.zeros((prepared.count, self.backbone.outputs), np.float32) for _ in members]
        for each in prepared.passes:
            with self._lock:
                found = self._answered(members, each)
            for answer, logits in zip(answers, found, strict=True):
                answer[each.places] = in_units(self.recipe, logits.numpy())
        return answers

    def _length(self, encoded: Encoded) -> int:
        own = self.backbone.length(encoded)
        return next(length for length in self._lengths if length >= own)

    def _start(self, member: Member) -> int:
        return min((self._layer_of[name] for name in member.lora), default=self.floor)

    def _install(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Replace adapter targets and heads by routed ones; per target the widths (in, out)."""
        shapes = targets(model, self.backbone.layers, self.recipe, self.floor)
        begin = boundaries(self.recipe, self.backbone.depth)
        for name, module in list(model.named_modules()):
            index = self.backbone.layer_index(name)
            # The first layer's: their input may be the trunk's, see `RoutedLinear.shared`.
            if name in shapes or (index in begin and isinstance(module, nn.Linear)):
                replace_module(model, name, RoutedLinear(module, self._route, name, index))
            elif name in self.backbone.heads:
                replace_module(model, name, RoutedHead(module, self._route, name))
        return shapes

    def _group(self, members: int) -> int:
        return min(MEMBERS, max(1, members)) if self.batched and not self._route.apart else 1

    def _trunk(self, batch: Batch, places: Sequence[int], starts: Collection[int]) -> Iterator[Pass]:
        """Hidden states where members start, in passes of few fixed sizes."""
        for rows in _passes(batch.rows, 1, batched=self.batched):
            with torch.inference_mode(), self.backbone.autocast():
                hidden = self._window.states(batch[rows], starts)
            yield Pass(places[rows], batch[rows].bare(), hidden)

    def _answered(self, members: Sequence[Member], given: Pass) -> list[Tensor]:
        """Per member its logits (rows, outputs), those that start together together."""
        by_start: dict[int, list[int]] = {}
        for place, member in enumerate(members):
            start = max(boundary for boundary in given.hidden if boundary <= self._start(member))
            by_start.setdefault(start, []).append(place)
        found: dict[int, Tensor] = {}
        for start, places in by_start.items():
            group = self._group(len(places))
            for at in range(0, len(places), group):
                some = places[at : at + group]
                own = [members[place] for place in some]
                parts = [
                    self._upper(own, given.batch[rows], given.hidden[start][rows], start)
                    for rows in _passes(given.batch.rows, group, batched=self.batched)
                ]
                found |= zip(some, map(torch.cat, zip(*parts, strict=True)), strict=True)
        return [found[place] for place in range(len(members))]

    def _upper(self, members: Sequence[Member], batch: Batch, hidden: Tensor, start: int) -> Sequence[Tensor]:
        """Per member its logits (rows, outputs), in one pass from the base model's hidden state."""
        count = len(members)
        with self._route.of(members, start), torch.inference_mode(), self.backbone.autocast():
            logits = self._window.logits(batch.repeat(count), start, hidden.repeat(count, 1, 1))
        return logits.float().cpu().chunk(count)

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
            for at, memory in zip(cuts, memories, strict=True):
                some = members[at : at + group]
                start = min(self.starts(some))
                with self._route.of(some, start), torch.inference_mode(), self.backbone.autocast():
                    logits = self._window.following(given, seen, memory, (start, len(some)))
                found += logits.float().cpu().chunk(len(some))
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
                self._keeps_low(members, batch)
                and all(same_bits(there[order], here) for there, here in zip(together, moved, strict=True))
                and same_bits(many[:13], together[0])
                and same_bits(many[:18], fewer)
                and all(same_bits(logits, together[-1][row : row + 1]) for row, logits in enumerate(alone))
            ):
                return False
        return True

    def _keeps_low(self, members: Sequence[Member], batch: Batch) -> bool:
        """Whether a short prefix has the same bits entered where it starts, beside deeper ones, and from the floor."""
        top = boundaries(self.recipe, self.backbone.depth)[0]
        lora = {name: pair for name, pair in members[0].lora.items() if self._layer_of[name] >= top}
        short = Member(lora, members[0].head)
        beside = self._tensors([*members, short], batch)[-1]
        low = [self._answered([short], each)[0] for each in self._trunk(batch, range(batch.rows), {self.floor})]
        return same_bits(beside, torch.cat(low))

    def _tensors(self, members: Sequence[Member], batch: Batch) -> list[Tensor]:
        passes = self._trunk(batch, range(batch.rows), self.starts(members))
        return [torch.cat(parts) for parts in zip(*(self._answered(members, each) for each in passes), strict=True)]

    def _learn(self) -> None:
        """Find what members have in common in the layer that they start at, and whether they can share a pass."""
        batch = self.backbone.made_up(1, self._lengths[0])
        with torch.inference_mode(), self.backbone.autocast():
            self._window.learn_entry(batch)
        pair = self.made_up(2)
        for start in boundaries(self.recipe, self.backbone.depth):
            (given,) = self._trunk(batch, [0], {start})
            try:
                with self._route.learning():
                    self._upper(pair, given.batch, given.hidden[start], start)
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                if is_shortage(error):
                    raise
                self._route.apart = True

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
