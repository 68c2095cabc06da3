"""The reader of engine `s3t`: stacked adapters over one backbone."""

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from shards.assembly import Assembly
from shards.engine.backbone import Backbone
from shards.engine.ensemble import Ensemble, StageTensors
from shards.engine.interface import Input
from shards.engine.memory import enough_memory
from shards.engine.skeleton import Member, Prepared, Skeleton
from shards.recipe import Recipe


class StackedReader:
    """Tensors parsed once per artefact, and ensembles that refer to them over one copy of the backbone."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load the backbone unless it is given.

        Raises:
            BackboneError: it is not there, or is not the one that the recipe names.
        """
        with enough_memory(recipe, "loading the backbone"):
            self._skeleton = Skeleton(recipe, backbone, device=device)
        self._tensors = _WatchedTensors(recipe, device=device)
        self._lock = threading.Lock()

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        return self._tensors.digests()

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact."""
        self._tensors.add(digest, data)

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts, and watch over their tensors' end."""
        gone = list(digests)
        with self._lock:
            self._tensors.discard(gone)
            return [reference for digest in gone for reference in self._tensors.watched.pop(digest, ())]

    def build(self, assembly: Assembly) -> Ensemble:
        """An ensemble that refers to the tensors in memory: a fraction of a millisecond. A merged adapter is copied
        from them, and watched over with each of them.
        """
        made = Ensemble(self._skeleton, self._tensors, assembly)
        if assembly.aggregation == "merged":
            own = [weakref.ref(tensor) for member in made.members for tensor in _tensors_of(member)]
            with self._lock:
                for digest in {digest for member in assembly.members if member for digest in member.artifacts}:
                    if (known := self._tensors.watched.get(digest)) is not None:  # else it was dropped meanwhile
                        known[:] = [*(reference for reference in known if reference() is not None), *own]
        return made

    def prepare(self, inputs: Sequence[Input]) -> Prepared:
        """Take inputs through the trunk."""
        return self._skeleton.prepare(inputs)


class _WatchedTensors(StageTensors):
    """Keeps a weak reference to every tensor of an artefact. One thread adds."""

    def __init__(self, recipe: Recipe, *, device: str) -> None:
        super().__init__(recipe, device=device)
        self.watched: dict[str, list[weakref.ref[Any]]] = {}
        self._made: list[weakref.ref[Any]] = []

    def add(self, digest: str, data: bytes) -> None:
        if digest in self:
            return
        self._made = []
        super().add(digest, data)
        self.watched[digest], self._made = self._made, []

    def member_of(self, tensors: Mapping[str, Tensor]) -> Member:
        member = super().member_of(tensors)
        self._made += [weakref.ref(tensor) for tensor in (*tensors.values(), *_tensors_of(member))]
        return member


def _tensors_of(member: Member) -> Iterator[Tensor]:
    for pair in member.lora.values():
        yield from pair
    yield from member.head.values()
