"""The reader of engine `ridge`: sums by cell in memory, and one solve for each assembly."""

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from shards.assembly import Assembly, Member
from shards.engine.artifacts import decode_verified
from shards.engine.backbone import Backbone
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.known import Known
from shards.engine.pools import Pools
from shards.engine.ridge import decode_sums, load_backbone
from shards.engine.tasks import in_units
from shards.errors import ArtifactDigestError, RecipeError, ShardsError
from shards.logits import Logits
from shards.recipe import Recipe
from shards.solver import Weights, answers, solve
from shards.stages import Stage
from shards.sums import Features, Sums, total


class RidgeReader:
    """Sums of cells, parsed once per artefact. What was added up or solved is kept by predictors alone."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load the backbone unless it is given.

        Raises:
            BackboneError: it is not there, is not the one that the recipe names, or has too few layers.
        """
        self.recipe = recipe
        self.pools = Pools(backbone or load_backbone(recipe, device), recipe)
        self._digest = recipe.digest
        self._lock = threading.Lock()
        self._cells: dict[str, tuple[Stage, Sums]] = {}
        self._derived: dict[str, list[weakref.ref[Any]]] = {}
        """By digest of a cell the weights that were solved with it."""

    def held(self) -> frozenset[str]:
        """Digests of the artefacts in memory."""
        with self._lock:
            return frozenset(self._cells)

    def load(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact; nothing is done for one already there.

        Raises:
            ArtifactDigestError: other bytes than the digest promises, or of another recipe.
        """
        if digest in self._cells:
            return
        artifact = decode_verified(data, digest, self._digest)
        parsed = (artifact.stage, decode_sums(artifact))
        with self._lock:
            self._cells[digest] = parsed

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        """Forget artefacts; predictors keep the weights that were solved with them until they go.

        Returns:
            References to the sums and to those weights, dead once they have left the memory.
        """
        found: list[weakref.ref[Any]] = []
        with self._lock:
            for digest in digests:
                if (gone := self._cells.pop(digest, None)) is not None:
                    found += [weakref.ref(gone[1].xtx), weakref.ref(gone[1].xty)]
                found += self._derived.pop(digest, ())
        return found

    def build(self, assembly: Assembly) -> "RidgePredictor":
        """Add up the cells' sums and solve once: 3 ms for 385 features, 60 ms for 1,537.

        Raises:
            RecipeError: the assembly is of another recipe, or the sums cannot be added or solved.
            ArtifactDigestError: an artefact is not in memory, or is not what the assembly says.
        """
        if assembly.recipe != self._digest:
            raise RecipeError(f"the assembly is of recipe {assembly.recipe[:12]}, the model of {self._digest[:12]}")
        live = [member for member in assembly.members if member]
        cells = [self._cell(member) for member in live]
        weights = solve(self.pools.grid, total(self.pools.grid, cells)) if cells else None
        if weights is not None:
            with self._lock:
                for member in live:
                    if member.artifacts[0] not in self._cells:  # dropped meanwhile
                        continue
                    known = [ref for ref in self._derived.get(member.artifacts[0], ()) if ref() is not None]
                    self._derived[member.artifacts[0]] = [*known, weakref.ref(weights)]
        return RidgePredictor(self.recipe, self.pools, weights)

    def prepare(self, inputs: Sequence[Input]) -> Features:
        """Features of the inputs."""
        return self.pools.features(inputs)

    def _cell(self, member: Member) -> Sums:
        """The sums that an assembly means."""
        digest = member.artifacts[0]
        with self._lock:
            found = self._cells.get(digest)
        if found is None:
            raise ArtifactDigestError(f"artefact {digest[:12]} is not in memory; load it before building")
        stage, sums = found
        if stage.key != member.stage or stage.prefix != member.prefix or len(member.artifacts) != 1:
            raise ArtifactDigestError(
                f"artefact {digest[:12]} is of stage {stage.key[:12]}, the assembly names {member.stage[:12]}"
            )
        return sums


class RidgePredictor:
    """One linear model over the features. Immutable; safe to use from several threads."""

    def __init__(self, recipe: Recipe, pools: Pools, weights: Weights | None) -> None:
        """`weights` (features, outputs), or None where no cell is live."""
        self._recipe = recipe
        self._pools = pools
        self._weights = weights

    def logits(self, inputs: Sequence[Input]) -> Logits:
        """Logits (inputs, outputs); each answer's bits depend on its own input alone.

        Raises:
            ShardsError: no cell is live.
        """
        self._solved()
        return self.answer(self._pools.features(inputs))

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input on its own, with the length at which it runs."""
        return self._pools.encode(inputs)

    def infer(self, encoded: Sequence[Encoded], known: Sequence[Known] = ()) -> Logits:  # noqa: ARG002 - one product
        """Logits of encoded inputs, to the same bits.

        Raises:
            ShardsError: no cell is live.
        """
        self._solved()
        return self.answer(self._pools.features_of(encoded))

    def answer(self, prepared: Features) -> Logits:
        """Logits of inputs that the reader prepared, to the same bits.

        Raises:
            ShardsError: no cell is live.
        """
        return in_units(self._recipe, answers(self._pools.grid, self._solved(), prepared))

    def _solved(self) -> Weights:
        if self._weights is None:
            raise ShardsError("no cell has clean sums: nothing can be answered until one is rebuilt")
        return self._weights
