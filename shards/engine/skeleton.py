"""The serving model: one copy of the backbone that answers for several members at once.

The trunk runs once per input; above it the rows are repeated per member, every frozen matrix is multiplied
once for all of them, and each member's adapters and head act on its own rows. Members are plain tensors
handed in per call, so exchanging what is served copies no weight.
"""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shards.engine.backbone import Backbone
from shards.engine.trunk import boundaries, probe_tokens
from shards.engine.window import Tokens, Window, same_bits
from shards.logits import Logits
from shards.recipe import Recipe

SEQUENCES = 32
"""Rows times members per pass; beyond it activations leave the cache (facts/training.md, section 4)."""
MEMBERS = 8
"""Members per pass."""
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Padded lengths; which one is used is decided by the input's own token count."""


@dataclass(frozen=True, slots=True)
class Member:
    """Tensors of one stage with its ancestors, ready to serve."""

    lora: Mapping[str, tuple[Tensor, Tensor]]
    """By module path: A (rank, in) and B (out, rank) times the LoRA scale, both in the serving precision."""
    head: Mapping[str, Tensor]
    """By path in the model: the head's parameters, float32."""


def buckets(max_tokens: int) -> tuple[int, ...]:
    """Padded lengths in use, the last being `max_tokens`."""
    return (*(length for length in BUCKETS if length < max_tokens), max_tokens)


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one padded length that go through the layers together."""

    rows: slice
    places: Sequence[int]
    """Where each row stands among the caller's texts."""
    tokens: Tokens
    hidden: Tensor
    """(rows, length, width) at the lowest trained layer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Texts as the trunk leaves them, for any members to answer. Derived from the texts: it has to go with them."""

    count: int
    passes: tuple[Pass, ...]


class _Route:
    """Whose rows are whose in the pass under way."""

    members: Sequence[Member] = ()

    def split(self, rows: int) -> Iterator[tuple[Member, slice]]:
        each = rows // max(1, len(self.members))
        for place, member in enumerate(self.members):
            yield member, slice(place * each, (place + 1) * each)


class _RoutedLinear(nn.Module):
    """A frozen matrix for all rows, plus each member's adapter, where it has one here, on its own."""

    def __init__(self, base: nn.Module, route: _Route, name: str) -> None:
        super().__init__()
        self.base = base
        self.route = route
        self.name = name
        self.shared: bool | None = None
        """Whether every member's rows are still the trunk's, so that one product serves all; found by the probe."""

    def forward(self, hidden: Tensor) -> Tensor:
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


class _RoutedHead(nn.Module):
    """Each member's own head on its own rows; without members the untrained one (its output is not used)."""

    def __init__(self, template: nn.Module, route: _Route, name: str) -> None:
        super().__init__()
        self.template = template
        self.route = route
        self.prefix = name + "."

    def forward(self, rows: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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


class Skeleton:
    """Answers texts for any members of a recipe. One pass at a time: a lock makes concurrent callers wait."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load the backbone unless it is given, and check at start-up that answers depend on their input
        alone.

        Raises:
            BackboneError: see `Backbone.load`.
        """
        self.recipe = recipe
        self.digest = recipe.digest
        self.backbone = backbone or Backbone.load(recipe, device)
        self.floor = boundaries(recipe, self.backbone.depth)[-1]
        self._lengths = buckets(recipe.max_tokens)
        self._route = _Route()
        self._lock = threading.Lock()
        model = self.backbone.pure_replica(self._lengths, SEQUENCES)
        shapes = self._install(model)
        self._window = Window(model, self.backbone.layers, as_tuple=self.backbone.as_tuple)
        self.batched = True
        self.batched = self._is_pure(shapes)

    @property
    def purity(self) -> str:
        """Result of the start-up probe: `batched`, or `single` (each input and member runs alone)."""
        return "batched" if self.batched else "single"

    def logits(self, members: Sequence[Member], texts: Sequence[str]) -> list[Logits]:
        """Per member the logits (texts, classes) of each text.

        Each text's bits depend on that text and member alone: not on its neighbours, nor on the other
        members.
        """
        return self.answer(members, self.prepare(texts, len(members)))

    def prepare(self, texts: Sequence[str], members: int = 1) -> Prepared:
        """Take texts through the trunk, in passes that suit so many members at once."""
        with self._lock:  # tokenizers keep their cutting length as state
            ids = self.backbone.token_ids(texts)
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(ids):
            by_length.setdefault(next(b for b in self._lengths if b >= len(row)), []).append(place)
        passes: list[Pass] = []
        for length, places in sorted(by_length.items()):
            tokens = self.backbone.pad([ids[place] for place in places], length)
            with self._lock:
                passes += [replace(each, places=places[each.rows]) for each in self._trunk(tokens, members)]
        return Prepared(len(ids), tuple(passes))

    def answer(self, members: Sequence[Member], prepared: Prepared) -> list[Logits]:
        """Per member the logits (texts, classes) of prepared texts; the bits are those of `logits`."""
        answers = [np.zeros((prepared.count, len(self.recipe.classes)), np.float32) for _ in members]
        for each in prepared.passes:
            with self._lock:
                found = self._upper(members, each)
            for answer, logits in zip(answers, found, strict=True):
                answer[each.places] = logits.numpy()
        return answers

    def _install(self, model: nn.Module) -> dict[str, tuple[int, int]]:
        """Replace adapter targets and heads by routed ones; per target the widths (in, out)."""
        shapes: dict[str, tuple[int, int]] = {}
        targets = tuple("." + target for target in self.recipe.lora.targets)
        for name, module in list(model.named_modules()):
            layer = self.backbone.layer_index(name)
            if layer is not None and layer >= self.floor and name.endswith(targets):
                weight: Tensor = module.get_parameter("weight")
                turned = weight if isinstance(module, nn.Linear) else weight.t()  # Conv1D keeps (in, out)
                shapes[name] = (turned.shape[1], turned.shape[0])
                _replace(model, name, _RoutedLinear(module, self._route, name))
            elif layer == self.floor and isinstance(module, nn.Linear):  # for `shared`: its input may be the trunk's
                _replace(model, name, _RoutedLinear(module, self._route, name))
            elif name in self.backbone.heads:
                _replace(model, name, _RoutedHead(module, self._route, name))
        return shapes

    def _group(self, members: int) -> int:
        return min(MEMBERS, max(1, members)) if self.batched else 1

    def _trunk(self, tokens: Tokens, members: int) -> Iterator[Pass]:
        """Hidden states at the lowest trained layer, in passes of few fixed sizes."""
        for rows in _passes(tokens.ids.shape[0], self._group(members), batched=self.batched):
            with torch.inference_mode(), self.backbone.autocast():
                hidden = self._window.states(tokens[rows], [self.floor])[self.floor]
            yield Pass(rows, (), tokens[rows], hidden)

    def _upper(self, members: Sequence[Member], given: Pass) -> list[Tensor]:
        """Per member its logits (rows, classes), from the trunk's hidden state."""
        found: list[Tensor] = []
        group = self._group(len(members))
        try:
            for at in range(0, len(members), group):
                self._route.members = members[at : at + group]
                count = len(self._route.members)
                repeated = Tokens(given.tokens.ids.repeat(count, 1), given.tokens.mask.repeat(count, 1))
                with torch.inference_mode(), self.backbone.autocast():
                    logits = self._window.logits(repeated, self.floor, given.hidden.repeat(count, 1, 1))
                found += logits.float().cpu().chunk(count)
        finally:
            self._route.members = ()  # kept, they would outlive their erasure until the next pass
        return found

    def _is_pure(self, shapes: Mapping[str, tuple[int, int]]) -> bool:
        """Whether logits keep their bits alone, among others, moved, and beside any number of members."""
        members = [self._made_up(shapes, seed) for seed in range(min(MEMBERS, self.recipe.shards))]
        for length in {self._lengths[0], self._lengths[-1]}:
            tokens = probe_tokens(self.backbone, 13, length)
            order = torch.arange(12, -1, -1)
            together = self._tensors(members, tokens)
            moved = self._tensors(members[::-1], tokens[order])[::-1]
            few = self._tensors(members[:1], tokens[:3])[0]
            alone = [self._tensors(members[-1:], tokens[row : row + 1])[0] for row in range(3)]
            if not (
                all(same_bits(there[order], here) for there, here in zip(together, moved, strict=True))
                and same_bits(few, together[0][:3])
                and all(same_bits(logits, together[-1][row : row + 1]) for row, logits in enumerate(alone))
            ):
                return False
        return True

    def _tensors(self, members: Sequence[Member], tokens: Tokens) -> list[Tensor]:
        passes = [self._upper(members, each) for each in self._trunk(tokens, len(members))]
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


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _passes(rows: int, group: int, *, batched: bool) -> Iterator[slice]:
    """Cut rows into powers of two, the largest such that rows times members stays near `SEQUENCES`."""
    at = 0
    most = 2 ** int(math.log2(max(1, SEQUENCES // group))) if batched else 1
    while at < rows:
        size = min(most, 2 ** int(math.log2(rows - at)))
        yield slice(at, at + size)
        at += size
