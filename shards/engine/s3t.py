"""Training of S3T stages (arXiv 2406.16257): block i from the top on slices 1..i, everything else frozen."""

import math
from collections.abc import Iterable, Mapping, Sequence
from uuid import UUID

import torch
from torch import Tensor, nn

from shards.engine.adapters import Adapters
from shards.engine.artifacts import Artifact, decode, encode
from shards.engine.backbone import Backbone
from shards.engine.determinism import epoch_order, stage_seed
from shards.engine.interface import Progress, check_recipe
from shards.engine.memory import enough_memory
from shards.engine.tasks import Target, loss, targets
from shards.engine.trunk import Trunk
from shards.engine.window import Window
from shards.errors import ArtifactDigestError, DivergedError, ShardsError
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage


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
        with enough_memory(recipe, "loading the backbone"):
            self.backbone = backbone or Backbone.load(recipe, device)
            self.trunk = Trunk(self.backbone, recipe, cache_bytes)
            self._adapters = Adapters(self.backbone, recipe, self.trunk.boundaries[-1])
        self._window = Window(self._adapters.model, self.backbone.layers, as_tuple=self.backbone.as_tuple)
        self._shard: int | None = None

    @property
    def purity(self) -> str:
        """Result of the trunk's start-up probe; belongs in the platform fingerprint."""
        return self.trunk.purity

    @property
    def record_ids(self) -> list[UUID]:
        """Records whose hidden states are in memory."""
        return self.trunk.record_ids

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Drop the hidden states of these records."""
        self.trunk.forget(record_ids)

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

        Progress counts optimizer steps. For the rest see `Trainer.train`.

        Raises:
            DivergedError: a loss or a weight is no longer a number; the message names the step.
        """
        check_recipe(stage, self.recipe)
        if stage.shard != self._shard:  # features serve no other shard
            self.trunk.clear()
            self._shard = stage.shard
        seed = stage_seed(self.recipe, stage.shard, stage.prefix)
        self._adapters.restore(_ancestors(stage, parents), seed)
        boundary = self.trunk.boundaries[stage.depth - 1]
        block = self._adapters.block(boundary, boundary + self.recipe.layers_per_slice)
        self._adapters.initialise(block, seed)
        before = self._adapters.frozen(block)
        with enough_memory(self.recipe, f"training stage {stage.key[:12]}"):
            optimizer = self._fit(block, records, boundary, seed, progress)
        if self._adapters.frozen(block) != before:
            raise ShardsError(f"training stage {stage.key[:12]} moved a frozen tensor; nothing was kept, report this")
        if records and not _learnt(block, optimizer):
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
    ) -> torch.optim.Optimizer:
        """Train the block's adapters and the head above `boundary`, with a fresh optimizer, which is returned."""
        wanted = targets(self.recipe, records)
        self._adapters.unfreeze(block, backbone_dropout=self.recipe.backbone_dropout)
        optimizer = self._optimizer(block)
        self.trunk.warm(records, boundary)
        size, done = self.recipe.batch_size, 0
        total = self.recipe.epochs * math.ceil(len(wanted) / size)
        torch.manual_seed(seed)  # the stream that dropout draws from
        for epoch in range(self.recipe.epochs):
            order = epoch_order(seed, epoch, wanted)
            for at in range(0, len(order), size):
                done += 1
                self._step(optimizer, done, order[at : at + size], wanted, boundary)
                if progress:
                    progress(done, total)
        if not all(tensor.isfinite().all() for tensor in (*block.values(), *self._adapters.head.values())):
            raise DivergedError("training diverged: lower learning_rate or head_learning_rate, as a new recipe")
        return optimizer

    def _step(
        self,
        optimizer: torch.optim.Optimizer,
        step: int,
        rows: Sequence[UUID],
        wanted: Mapping[UUID, Target],
        boundary: int,
    ) -> None:
        hidden, batch = self.trunk.rows(rows, boundary)
        with self.backbone.autocast():
            logits = self._window.logits(batch, boundary, hidden)
        optimizer.zero_grad()
        found = loss(self.recipe, logits, [wanted[record_id] for record_id in rows], batch)
        if not found.isfinite():
            raise DivergedError(
                f"the loss is no longer a number at step {step} (learning_rate {self.recipe.learning_rate}, "
                f"head_learning_rate {self.recipe.head_learning_rate}): lower them, as a new recipe"
            )
        found.backward()
        optimizer.step()

    def _optimizer(self, block: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        head = list(self._adapters.head.values())
        groups = [
            {"params": list(block.values()), "lr": self.recipe.learning_rate},
            {"params": head, "lr": self.recipe.head_learning_rate},
        ]
        return torch.optim.AdamW(groups, weight_decay=self.recipe.weight_decay, fused=True)


def _learnt(block: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a B of the block moved, and every other one had a gradient of exactly 0 at each step.

    A query's has where texts are of one token. The optimizer knows no moments of a B that the loss does not reach.
    """
    ups = [tensor for name, tensor in block.items() if ".lora_B." in name]
    still = [optimizer.state.get(tensor) for tensor in ups if not tensor.any()]
    pulled = [not moments or moments["exp_avg"].any() or moments["exp_avg_sq"].any() for moments in still]
    return len(still) < len(ups) and not any(pulled)


def _ancestors(stage: Stage, parents: Sequence[bytes]) -> list[Artifact]:
    """The parents' artefacts, after checking that they are the stage's own line."""
    line = [decode(parent) for parent in parents]
    expected = [(stage.shard, stage.prefix[:depth], stage.roots[:depth]) for depth in range(1, stage.depth)]
    given = [(parent.stage.shard, parent.stage.prefix, parent.stage.roots) for parent in line]
    keys = [None, *(parent.stage.key for parent in line)]
    if given != expected or [*(parent.stage.parent for parent in line), stage.parent] != keys:
        raise ArtifactDigestError(f"stage {stage.key[:12]} was given artefacts that are not its ancestors'")
    return line
