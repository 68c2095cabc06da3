"""Stages of engine `ridge`: the exact sums of one cell, of which an assembly's are added up and solved once."""

import dataclasses
from collections.abc import Iterable, Sequence
from uuid import UUID

import numpy as np
import torch

from shards.engine.artifacts import Artifact, decode, encode
from shards.engine.backbone import Backbone
from shards.engine.interface import Progress, check_recipe, inputs_of
from shards.engine.memory import enough_memory
from shards.engine.pools import Pools
from shards.engine.tasks import targets
from shards.errors import ArtifactDigestError
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage
from shards.sums import Sums, Targets, nothing, sums_of

CHUNK = 256
"""Records whose features are in memory at a time, and between two reports of progress."""


class RidgeTrainer:
    """The trainer of one recipe. A stage is one pass of its cell's records through the backbone; nothing is kept."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu") -> None:
        """Load the backbone unless it is given.

        Raises:
            BackboneError: see `Backbone.load`; or it has fewer layers than `ridge.layers`.
        """
        self.recipe = recipe
        with enough_memory(recipe, "loading the backbone"):
            self.backbone = backbone or load_backbone(recipe, device)
            self.pools = Pools(self.backbone, recipe)

    @property
    def purity(self) -> str:
        """Result of the features' start-up probe; belongs in the platform fingerprint."""
        return self.pools.purity

    @property
    def record_ids(self) -> list[UUID]:
        """Records of which something is in memory: none between two calls."""
        return []

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Nothing to drop."""

    def clear(self) -> None:
        """Nothing to leave."""

    def train(
        self, stage: Stage, records: Sequence[Record], parents: Sequence[bytes], progress: Progress | None = None
    ) -> bytes:
        """The artefact of a cell: its sums. It has no parents; progress counts records. See `Trainer.train`.

        Raises:
            RecipeError: also where the sums may overflow.
            ShardsError: the backbone gives numbers that are not finite.
        """
        check_recipe(stage, self.recipe)
        if parents:
            raise ArtifactDigestError(f"stage {stage.key[:12]} is of one cell and has no parents; plan it again")
        with enough_memory(self.recipe, f"training stage {stage.key[:12]}"):
            return encode_sums(stage, self.sums(records, progress))

    def sums(self, records: Sequence[Record], progress: Progress | None = None) -> Sums:
        """Sums over records, whose order does not show.

        Raises:
            RecipeError: a label or input does not fit, or the sums may overflow.
            ShardsError: the backbone gives numbers that are not finite.
        """
        grid = self.pools.grid
        # As if every cell had so many: a cell is refused here, before what is served of all could be.
        grid.check(len(records) * self.recipe.seats)
        grid.check_penalty(len(records) * self.recipe.seats, self.pools.width)
        wanted = self._targets(records)
        found = nothing(grid, self.pools.width, self.recipe.outputs)
        for at in range(0, len(records), CHUNK):
            chunk = records[at : at + CHUNK]
            features = self.pools.features(inputs_of(self.recipe, chunk))
            found = found.add(sums_of(grid, features, wanted[at : at + CHUNK]), grid)
            if progress:
                progress(at + len(chunk), len(records))
        return found

    def remove(self, stage: Stage, before: bytes, records: Sequence[Record]) -> bytes:
        """The artefact of `stage` from that of the same cell as it was with `records`: bit for bit what `train` gives.

        Takes a pass of the removed records alone through the backbone: milliseconds each, however large the cell is.

        Raises:
            ArtifactDigestError: `before` is of another cell.
            ShardsError: the records are not among those of `before`; see `sums` for others.
        """
        check_recipe(stage, self.recipe)
        old = decode(before)
        if (old.stage.recipe, old.stage.shard, old.stage.prefix) != (stage.recipe, stage.shard, stage.prefix):
            raise ArtifactDigestError(
                f"stage {old.stage.key[:12]} is of another cell than {stage.key[:12]}; give the same cell's artefact"
            )
        return encode_sums(stage, decode_sums(old).subtract(self.sums(records)))

    def _targets(self, records: Sequence[Record]) -> Targets:
        found = targets(self.recipe, records)
        own = [found[record.record_id] for record in records]
        if self.recipe.task == "regression":
            return self.pools.grid.values(own)
        return np.eye(self.recipe.outputs, dtype=np.int32)[np.array(own, np.int64)]


def load_backbone(recipe: Recipe, device: str = "cpu") -> Backbone:
    """The recipe's backbone; its slices are of data alone, so no layer is asked for on their account.

    Raises:
        BackboneError: see `Backbone.load`.
    """
    whole = dataclasses.replace(recipe, slices=1, layers_per_slice=1, trunk_layers=None, prior=())
    return Backbone.load(whole, device)


def encode_sums(stage: Stage, sums: Sums) -> bytes:
    """Artefact bytes; equal sums give equal bytes."""
    arrays = {"count": np.array([sums.count], np.int64), "xtx": sums.xtx, "xty": sums.xty}
    return encode(stage, {name: torch.from_numpy(array) for name, array in arrays.items()})


def decode_sums(artifact: Artifact) -> Sums:
    """The sums in a verified artefact.

    Raises:
        ArtifactDigestError: it holds none.
    """
    try:
        count, xtx, xty = (artifact.tensors[name].numpy() for name in ("count", "xtx", "xty"))
    except KeyError:
        key = artifact.stage.key[:12]
        raise ArtifactDigestError(f"the artefact of stage {key} holds no sums; train the stage again") from None
    return Sums(int(count[0]), xtx, xty)
