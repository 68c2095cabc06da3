"""What a replica needs of an engine, and the adapter to `shards.engine.ensemble`."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from shards.assembly import Assembly
from shards.engine.ensemble import Ensemble, StageTensors
from shards.engine.skeleton import Member, Skeleton
from shards.logits import Logits
from shards.recipe import Recipe


class Predictor(Protocol):
    """One assembly in memory, immutable."""

    def logits(self, texts: Sequence[str]) -> Logits:
        """Logits (texts, classes); each text's answer depends on it alone."""
        ...


class Engine(Protocol):
    """The weights of one model that this process holds, by artefact digest. Calls come from several threads."""

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        ...

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact.

        Raises:
            ArtifactDigestError: other bytes than the digest promises.
        """
        ...

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts; predictors built from them keep theirs until they go.

        Returns:
            References that are dead once the weights have left the memory.
        """
        ...

    def build(self, assembly: Assembly) -> Predictor:
        """A predictor from artefacts in memory, within two milliseconds.

        Raises:
            ShardsError: an artefact is not in memory, or is not what the assembly says.
        """
        ...


EngineFactory = Callable[[Recipe], Engine]
"""Makes the engine of a model, loading its backbone: may take seconds."""


class EnsembleEngine:
    """The real engine: tensors parsed once per artefact, ensembles that refer to them."""

    def __init__(self, recipe: Recipe, *, device: str = "cpu") -> None:
        """Load the backbone.

        Raises:
            BackboneError: it is not there, or is not the one that the recipe names.
        """
        self._skeleton = Skeleton(recipe, device=device)
        self._tensors = _WatchedTensors(recipe, device=device)

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        return self._tensors.digests()

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact."""
        self._tensors.add(digest, data)

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts, and watch over their tensors' end."""
        gone = list(digests)
        self._tensors.discard(gone)
        return [reference for digest in gone for reference in self._tensors.watched.pop(digest, ())]

    def build(self, assembly: Assembly) -> Predictor:
        """An ensemble that refers to the tensors in memory."""
        return Ensemble(self._skeleton, self._tensors, assembly)


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
        pairs = (tensor for pair in member.lora.values() for tensor in pair)
        self._made += [weakref.ref(tensor) for tensor in (*tensors.values(), *pairs, *member.head.values())]
        return member
