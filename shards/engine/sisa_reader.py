"""The reader of engine `sisa`: whole models that share one module tree, each with its own tensors."""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.assembly import Assembly, Member
from shards.engine import tasks
from shards.engine.artifacts import decode_verified
from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.known import Known, completed
from shards.engine.networks import MOST, Tensors, network_of
from shards.engine.window import Batch, same_bits
from shards.errors import ArtifactDigestError, RecipeError, ShardsError
from shards.logits import Logits, mean_of_logits
from shards.recipe import Recipe
from shards.stages import Stage

PROBES = 2 * MOST - 1
"""32 + 16 + .. + 1: in reverse order, the first 31 move from the largest passes to those of every smaller size."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows of one padded length that go through a model together."""

    places: Sequence[int]
    """Where the first rows stand among the caller's inputs; those after them only fill up."""
    batch: Batch


@dataclass(frozen=True, slots=True)
class Prepared:
    """Inputs as the network takes them, for any members to answer. Derived from the inputs: it has to go with them."""

    count: int
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    stage: Stage
    tensors: Tensors
    watched: tuple[weakref.ref[Tensor], ...]


class SisaReader:
    """Tensors parsed once per artefact; every stage kept is a whole model, so that any prefix can serve at once.

    One pass at a time: a lock makes concurrent callers wait.
    """

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load what the recipe serves, its backbone unless it is given.

        Raises:
            ModuleError: the module cannot be imported or built, or is not the recipe's.
            BackboneError: see `Backbone.load`.
        """
        self.recipe = recipe
        self.digest = recipe.digest
        self._network = network_of(recipe, backbone, device)
        self._base = self._network.base()
        self._lock = threading.Lock()
        self._coding = threading.Lock()
        """Tokenizers keep their cutting length as state."""
        self._held: dict[str, _Held] = {}
        lengths = self._network.codec.lengths
        self.batched = all(self._is_pure(length) for length in {lengths[0], lengths[-1]})
        """Whether a row keeps its bits among others; else each input runs alone."""

    @property
    def purity(self) -> str:
        """Result of the start-up probe: `batched`, or `single`."""
        return "batched" if self.batched else "single"

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        with self._lock:
            return frozenset(self._held)

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact; nothing is done for one already there.

        Raises:
            ArtifactDigestError: other bytes than the digest promises, of another recipe, or of another module.
        """
        if digest in self._held:
            return
        artifact = decode_verified(data, digest, self.digest)
        own = dict((*self._base.named_parameters(), *self._base.named_buffers()))
        if {name: tensor.shape for name, tensor in own.items()} != {n: t.shape for n, t in artifact.tensors.items()}:
            raise ArtifactDigestError(f"artefact {digest[:12]} holds other tensors than the module has")
        tensors = {name: tensor.to(own[name].device, own[name].dtype) for name, tensor in artifact.tensors.items()}
        watched = tuple(weakref.ref(tensor) for tensor in (*artifact.tensors.values(), *tensors.values()))
        with self._lock:
            self._held[digest] = _Held(artifact.stage, tensors, watched)

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts, and watch over their tensors' end."""
        with self._lock:
            gone = [self._held.pop(digest, None) for digest in digests]
        return [reference for each in gone if each is not None for reference in each.watched]

    def build(self, assembly: Assembly) -> "WholeEnsemble":
        """An ensemble that refers to the tensors in memory: a fraction of a millisecond.

        Raises:
            RecipeError: the assembly is of another recipe.
            ArtifactDigestError: an artefact is not in memory, or not the one the assembly means.
        """
        if assembly.recipe != self.digest:
            raise RecipeError(f"the assembly is of recipe {assembly.recipe[:12]}, the model of {self.digest[:12]}")
        return WholeEnsemble(self, assembly, tuple(self._tensors(member) for member in assembly.members if member))

    def prepare(self, inputs: Sequence[Input]) -> Prepared:
        """Encode inputs, in passes of fixed sizes; the length of a pass is decided by each input alone.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        return self.prepare_encoded([each for _, each in self.encode(inputs)])

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input as the network takes it, with the length that it is filled up to.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        with self._coding:
            encoded = self._network.codec.encode(inputs)
        return [(self._length(each), each) for each in encoded]

    def prepare_encoded(self, encoded: Sequence[Encoded]) -> Prepared:
        """Put encoded inputs side by side, in passes of fixed sizes."""
        by_length: dict[int, list[int]] = {}
        for place, each in enumerate(encoded):
            by_length.setdefault(self._length(each), []).append(place)
        passes: list[Pass] = []
        for length, places in sorted(by_length.items()):
            passes += self._passes(encoded, places, length, batched=self.batched)
        return Prepared(len(encoded), tuple(passes))

    def answer(self, tensors: Tensors, prepared: Prepared) -> Logits:
        """Logits (inputs, outputs) of one member, in the target's own unit."""
        found = np.zeros((prepared.count, self.recipe.outputs), np.float32)
        for each in prepared.passes:
            with self._lock:
                logits = self._forward(each.batch, tensors)
            found[each.places] = logits[: len(each.places)].cpu().numpy()
        return tasks.in_units(self.recipe, found)

    def _length(self, encoded: Encoded) -> int:
        own = self._network.codec.length(encoded)
        return next(length for length in self._network.codec.lengths if length >= own)

    def _tensors(self, line: Member) -> Tensors:
        """A member's tensors are its last stage's alone; the others stay for the prefixes that may follow."""
        held = self._held.get(line.artifacts[-1])
        if held is None:
            raise ArtifactDigestError(f"artefact {line.artifacts[-1][:12]} is not in memory; load it first")
        if held.stage.key != line.stage or held.stage.prefix != line.prefix:
            raise ArtifactDigestError(
                f"artefact {line.artifacts[-1][:12]} is of stage {held.stage.key[:12]}, the assembly names "
                f"{line.stage[:12]}"
            )
        return held.tensors

    def _forward(self, batch: Batch, tensors: Tensors | None = None) -> Tensor:
        with torch.inference_mode():
            return self._network.call(self._base, batch, tensors)

    def _passes(
        self, encoded: Sequence[Encoded], places: Sequence[int], length: int, *, batched: bool
    ) -> Iterator[Pass]:
        """Cut inputs of one length into passes whose row counts are the network's; filling is of made-up inputs.

        Where rows do not keep their bits, one input fills a whole pass: what it sees of others is itself.
        """
        codec, least = self._network.codec, self._network.sizes[-1]
        at = 0
        while at < len(places):
            size = next((size for size in self._network.sizes if size <= len(places) - at), least)
            chunk = places[at : at + size] if batched else places[at : at + 1]
            at += len(chunk)
            inputs = [encoded[place] for place in chunk]
            if (short := least - len(chunk)) > 0:
                inputs += codec.made_up(short, length) if batched else inputs * short
            yield Pass(chunk, codec.collate(inputs, length))

    def _is_pure(self, length: int) -> bool:
        """Whether logits keep their bits alone, among others and moved."""
        rows = self._network.codec.made_up(PROBES, length)
        order = list(range(PROBES - 1, -1, -1))
        together = self._probe(rows, length)
        moved = self._probe([rows[place] for place in order], length)
        alone = [self._probe([row], length) for row in rows[:13]]
        return same_bits(moved, together[order]) and same_bits(torch.cat(alone), together[:13])

    def _probe(self, rows: Sequence[Encoded], length: int) -> Tensor:
        passes = self._passes(rows, range(len(rows)), length, batched=True)
        return torch.cat([self._forward(each.batch)[: len(each.places)] for each in passes])


class WholeEnsemble:
    """Mean of the live shards' logits. Immutable; safe to use from several threads."""

    def __init__(self, reader: SisaReader, assembly: Assembly, members: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes tensors by reference."""
        self.assembly = assembly
        self._reader = reader
        self._members = tuple(members)

    @property
    def live(self) -> int:
        """Number of live shards."""
        return len(self._members)

    def logits(self, inputs: Sequence[Input]) -> Logits:
        """Logits (inputs, outputs); an answer's bits depend on its own input alone.

        Raises:
            ShardsError: no shard is live.
        """
        return self.answer(self._reader.prepare(inputs))

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input on its own, with the length at which it runs."""
        return self._reader.encode(inputs)

    def infer(self, encoded: Sequence[Encoded], known: Sequence[Known] = ()) -> Logits:
        """Logits of encoded inputs, to the same bits.

        Raises:
            ShardsError: no shard is live.
        """
        if not known or not self._members:
            return self.answer(self._reader.prepare_encoded(encoded))

        def compute(rows: Sequence[int], places: Sequence[int]) -> list[Logits]:
            prepared = self._reader.prepare_encoded([encoded[row] for row in rows])
            return [self._reader.answer(self._members[place], prepared) for place in places]

        return mean_of_logits(completed([member for member in self.assembly.members if member], known, compute))

    def answer(self, prepared: Prepared) -> Logits:
        """Logits of inputs that the reader prepared, to the same bits.

        Raises:
            ShardsError: no shard is live.
        """
        if not self._members:
            raise ShardsError("no shard has a clean stage: nothing can be answered until one is rebuilt")
        return mean_of_logits([self._reader.answer(tensors, prepared) for tensors in self._members])
