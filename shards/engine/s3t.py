"""Training of S3T stages (arXiv 2406.16257): block i from the top on slices 1..i, everything else frozen."""

import math
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import torch
from torch import Tensor, nn

from shards.engine.adapters import Adapters
from shards.engine.artifacts import Artifact, decode, encode
from shards.engine.backbone import Backbone
from shards.engine.determinism import epoch_order, stage_seed
from shards.engine.trunk import Trunk
from shards.engine.window import Window
from shards.errors import ArtifactDigestError, ManifestMismatchError, RecipeError, ShardsError
from shards.manifest import Record, check_records
from shards.recipe import Recipe
from shards.stages import Stage

Progress = Callable[[int, int], None]
"""Called with optimizer steps done and steps in all."""


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


class S3T:
    """The engine of one recipe: built once per process, trains any stage of it. One thread at a time.

    Hidden states of a shard's records stay in memory from stage to stage, until another shard's stage comes
    or `trunk.forget()` is called; the last stage's weights stay until the next. Call `clear` when there is no next.
    """

    def __init__(
        self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu", cache_bytes: int = 2**30
    ) -> None:
        """Load the backbone unless it is given, and place the adapters of every block.

        Raises:
            BackboneError: see `Backbone.load`.
            RecipeError: the LoRA targets are not in the backbone.
        """
        self.recipe = recipe
        self.backbone = backbone or Backbone.load(recipe, device)
        self.trunk = Trunk(self.backbone, recipe, cache_bytes)
        self._adapters = Adapters(self.backbone, recipe, self.trunk.boundaries[-1])
        self._window = Window(self._adapters.model, self.backbone.layers, as_tuple=self.backbone.as_tuple)
        self._digest = recipe.digest
        self._shard: int | None = None

    @property
    def purity(self) -> str:
        """Result of the trunk's start-up probe; belongs in the platform fingerprint."""
        return self.trunk.purity

    def clear(self) -> None:
        """Leave neither features nor weights of what was trained here in memory."""
        self.trunk.clear()
        self._adapters.clear()

    def train(
        self,
        stage: Stage,
        records: Sequence[Record],
        parents: Sequence[bytes],
        progress: Progress | None = None,
    ) -> bytes:
        """Train one stage and return its artefact; without records, the stage as it is initialised.

        Args:
            stage: what to train.
            records: those of all slices of the stage's prefix, in any order (`check_lineage` gives them).
            parents: artefacts of the stage's ancestors, shortest prefix first.
            progress: called after each optimizer step.

        Raises:
            RecipeError: the stage is of another recipe, a label is not declared, or training diverged.
            ArtifactDigestError: the parents are not the stage's ancestors.
        """
        if stage.recipe != self._digest:
            raise RecipeError(f"stage {stage.key[:12]} is of recipe {stage.recipe[:12]}, not {self._digest[:12]}")
        if stage.shard != self._shard:  # features serve no other shard
            self.trunk.clear()
            self._shard = stage.shard
        seed = stage_seed(self.recipe, stage.shard, stage.prefix)
        self._adapters.restore(_ancestors(stage, parents), seed)
        boundary = self.trunk.boundaries[stage.depth - 1]
        block = self._adapters.block(boundary, boundary + self.recipe.layers_per_slice)
        self._adapters.initialise(block, seed)
        before = self._adapters.frozen(block)
        self._fit(block, records, boundary, seed, progress)
        if self._adapters.frozen(block) != before:
            raise ShardsError(f"training stage {stage.key[:12]} moved a frozen tensor; nothing was kept, report this")
        # Of B alone: A may stay where the gradient of a query vanishes.
        if records and not all(tensor.any() for name, tensor in block.items() if ".lora_B." in name):
            raise ShardsError(f"training stage {stage.key[:12]} left its block unmoved; nothing was kept, report this")
        return encode(stage, block | self._adapters.head)

    def train_whole(self, records: Sequence[Record], progress: Progress | None = None) -> dict[str, Tensor]:
        """One model on everything, for comparison: the same adapters on all blocks at once, on all records.

        Returns tensors for `shards.engine.ensemble.Monolithic`; they are never published.
        """
        seed = stage_seed(self.recipe, -1, ())
        boundary = self.trunk.boundaries[-1]
        block = self._adapters.block(boundary, self.backbone.depth)
        self.trunk.clear()
        self._adapters.restore((), seed)
        self._adapters.initialise(block, seed)
        self._fit(block, records, boundary, seed, progress)
        self.trunk.clear()
        return {name: tensor.detach().clone() for name, tensor in (block | self._adapters.head).items()}

    def _fit(
        self,
        block: Mapping[str, nn.Parameter],
        records: Sequence[Record],
        boundary: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        """Train the block's adapters and the head above `boundary`, with a fresh optimizer."""
        labels = self._labels(records)
        self._adapters.unfreeze(block, backbone_dropout=self.recipe.backbone_dropout)
        optimizer = self._optimizer(block)
        self.trunk.warm(records, boundary)
        size, done = self.recipe.batch_size, 0
        total = self.recipe.epochs * math.ceil(len(labels) / size)
        torch.manual_seed(seed)  # the stream that dropout draws from
        for epoch in range(self.recipe.epochs):
            order = epoch_order(seed, epoch, labels)
            for at in range(0, len(order), size):
                self._step(optimizer, order[at : at + size], labels, boundary)
                done += 1
                if progress:
                    progress(done, total)
        if not all(tensor.isfinite().all() for tensor in (*block.values(), *self._adapters.head.values())):
            raise RecipeError("training diverged: lower learning_rate or head_learning_rate, as a new recipe")

    def _step(
        self, optimizer: torch.optim.Optimizer, batch: Sequence[UUID], labels: Mapping[UUID, int], boundary: int
    ) -> None:
        hidden, tokens = self.trunk.rows(batch, boundary)
        target = torch.tensor([labels[record_id] for record_id in batch], device=self.backbone.device)
        with self.backbone.autocast():
            logits = self._window.logits(tokens, boundary, hidden)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), target).backward()
        optimizer.step()

    def _labels(self, records: Sequence[Record]) -> dict[UUID, int]:
        index = {label: place for place, label in enumerate(self.recipe.classes)}
        if unknown := sorted({record.label for record in records} - set(index)):
            raise RecipeError(f"label {unknown[0]!r} is not among the recipe's classes {list(index)}")
        return {record.record_id: index[record.label] for record in records}

    def _optimizer(self, block: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        head = list(self._adapters.head.values())
        groups = [
            {"params": list(block.values()), "lr": self.recipe.learning_rate},
            {"params": head, "lr": self.recipe.head_learning_rate},
        ]
        return torch.optim.AdamW(groups, weight_decay=self.recipe.weight_decay, fused=True)


def _ancestors(stage: Stage, parents: Sequence[bytes]) -> list[Artifact]:
    """The parents' artefacts, after checking that they are the stage's own line."""
    line = [decode(parent) for parent in parents]
    expected = [(stage.shard, stage.prefix[:depth], stage.roots[:depth]) for depth in range(1, stage.depth)]
    given = [(parent.stage.shard, parent.stage.prefix, parent.stage.roots) for parent in line]
    last = line[-1].stage.key if line else None
    if given != expected or last != stage.parent:
        raise ArtifactDigestError(f"stage {stage.key[:12]} was given artefacts that are not its ancestors'")
    return line
