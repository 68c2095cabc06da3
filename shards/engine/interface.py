"""What every engine offers: a trainer of stages, and a reader that makes what an assembly says servable."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

from shards.assembly import Assembly
from shards.engine.known import Known
from shards.errors import ManifestMismatchError, RecipeError
from shards.logits import Logits
from shards.manifest import Record, check_records
from shards.recipe import Recipe
from shards.stages import Stage

Input = str | bytes
"""One input: a text, a JSON array of numbers as text, or the bytes of an image file."""
Progress = Callable[[int, int], None]
"""Called with optimizer steps (or records) done and how many there are in all."""


class Trainer(Protocol):
    """Trains the stages of one recipe. One thread at a time; deterministic given `determinism.prepare()`."""

    recipe: Recipe

    @property
    def purity(self) -> str:
        """Result of the start-up probe (`batched` or `single`); belongs in the platform fingerprint."""
        ...

    @property
    def record_ids(self) -> list[UUID]:
        """Records of which something derived is in memory."""
        ...

    def train(
        self, stage: Stage, records: Sequence[Record], parents: Sequence[bytes], progress: Progress | None = None
    ) -> bytes:
        """Train one stage and return its artefact, a pure function of recipe, stage and records.

        Args:
            stage: what to train.
            records: those of all slices of the stage's prefix, in any order (`check_lineage` gives them).
            parents: artefacts of the stage's ancestors, shortest prefix first.
            progress: called as the work goes on.

        Raises:
            RecipeError: the stage is of another recipe, a label or an input does not fit, or training diverged.
            ArtifactDigestError: the parents are not the stage's ancestors.
            MemoryShortageError: memory ran out; the message names the fields to turn down.
        """
        ...

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Drop all that is derived from these records."""
        ...

    def clear(self) -> None:
        """Leave neither features nor weights of what was trained here in memory."""
        ...


class Predictor(Protocol):
    """One assembly in memory, immutable."""

    def logits(self, inputs: Sequence[Input]) -> Logits:
        """Logits (inputs, outputs); each input's answer depends on it alone."""
        ...

    def answer(self, prepared: Any) -> Logits:
        """Logits of inputs that the reader prepared, to the same bits."""
        ...

    def encode(self, inputs: Sequence[Input]) -> Sequence[tuple[int, Any]]:
        """Each input on its own: the length that it runs at, and what `infer` takes. Derived from it: it goes with it.

        Inputs of one length fill a pass, whoever sent them.
        """
        ...

    def infer(self, encoded: Sequence[Any], known: Sequence[Known] = ()) -> Logits:
        """Logits (inputs, outputs) of encoded inputs, to the same bits as `logits`.

        `known`, one per input, is what predictors of other versions computed of it; more is added.
        """
        ...


class Reader(Protocol):
    """The weights of one model that this process holds, by artefact digest. Calls come from several threads."""

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        ...

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact; nothing is done for one already there.

        Raises:
            ArtifactDigestError: other bytes than the digest promises, or of another recipe.
        """
        ...

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts; predictors built from them keep theirs until they go.

        Returns:
            References that are dead once the weights have left the memory.
        """
        ...

    def build(self, assembly: Assembly) -> Predictor:
        """A predictor from artefacts in memory.

        Raises:
            ShardsError: an artefact is not in memory, or is not what the assembly says.
        """
        ...

    def prepare(self, inputs: Sequence[Input]) -> Any:
        """What all predictors of this reader have in common for these inputs. Derived from them: it goes with them."""
        ...


ReaderFactory = Callable[[Recipe], Reader]
"""Makes the reader of a model, loading its backbone: may take seconds."""


def inputs_of(recipe: Recipe, records: Iterable[Record]) -> list[Input]:
    """What a model of the recipe is given of each record."""
    return [record.image if recipe.input == "image" else record.text for record in records]


def check_recipe(stage: Stage, recipe: Recipe) -> None:
    """Refuse a stage of another recipe.

    Raises:
        RecipeError: it is.
    """
    if stage.recipe != recipe.digest:
        raise RecipeError(f"stage {stage.key[:12]} is of recipe {stage.recipe[:12]}, not {recipe.digest[:12]}")


def check_lineage(stage: Stage, records_by_slice: Mapping[int, Sequence[Record]]) -> list[Record]:
    """The records of a stage, after checking that they are exactly those of its manifests.

    Raises:
        ManifestMismatchError: other slices than the stage reads, or other records than a manifest's.
    """
    if set(records_by_slice) != set(stage.prefix):
        raise ManifestMismatchError(
            f"stage {stage.key[:12]} reads slices {stage.prefix}, records of {sorted(records_by_slice)} were given"
        )
    for index, root in zip(stage.prefix, stage.roots, strict=True):
        check_records(records_by_slice[index], root)
    return [record for index in stage.prefix for record in records_by_slice[index]]
