"""Training of SISA stages (arXiv 1912.03817): the whole model, stage by stage, on slices 1..i of its shard.

The baseline that every other engine is compared with. A stage is a pure function of recipe and records, and its
artefact holds all that the next one and the server need: every parameter and every buffer.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

import torch
from torch import Tensor, nn

from shards.engine import schedule, tasks
from shards.engine.artifacts import decode, encode
from shards.engine.backbone import Backbone
from shards.engine.determinism import stage_seed
from shards.engine.inputs import Encoded
from shards.engine.interface import Progress, check_recipe, inputs_of
from shards.engine.memory import enough_memory
from shards.engine.modules import restore, seeded, state_of
from shards.engine.networks import network_of
from shards.errors import ArtifactDigestError, DivergedError
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Sisa:
    """The engine of one recipe: built once per process, trains any stage of it. One thread at a time.

    Inputs of a shard's records stay in memory as the model takes them, from stage to stage, until another shard's
    stage comes; weights do not outlive their stage.
    """

    purity = "whole"
    """Nothing is computed per record outside of training, so there is nothing to probe."""

    def __init__(
        self, recipe: Recipe, backbone: Backbone | None = None, *, device: str = "cpu", cache_bytes: int = 2**30
    ) -> None:
        """Load what the recipe trains, its backbone unless it is given. Of inputs at most `cache_bytes` are kept.

        Raises:
            ModuleError: the module cannot be imported or built, or is not the recipe's.
            BackboneError: see `Backbone.load`.
        """
        self.recipe = recipe
        self._network = network_of(recipe, backbone, device)
        self.backbone: Backbone | None = getattr(self._network, "backbone", None)
        self._passes = schedule.stage_epochs(recipe)
        self._cap = cache_bytes
        self.held_bytes = 0
        """Bytes of inputs in memory."""
        self._encoded: dict[UUID, tuple[bytes, Encoded]] = {}
        self._shard: int | None = None

    @property
    def record_ids(self) -> list[UUID]:
        """Records whose inputs are in memory."""
        return list(self._encoded)

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Drop the inputs of these records."""
        for record_id in record_ids:
            if (gone := self._encoded.pop(record_id, None)) is not None:
                self.held_bytes -= _size(gone[1])

    def clear(self) -> None:
        """Drop every input; there are no weights."""
        self._encoded.clear()
        self.held_bytes = 0

    def train(
        self,
        stage: Stage,
        records: Sequence[Record],
        parents: Sequence[bytes],
        progress: Progress | None = None,
    ) -> bytes:
        """Train one stage and return its artefact; without records, the stage as it is initialised.

        Of the parents the last alone is read; progress counts optimizer steps. For the rest see `Trainer.train`.

        Raises:
            DivergedError: a loss or a weight is not a number.
            ModuleError: the module fails on its rows.
        """
        check_recipe(stage, self.recipe)
        if stage.shard != self._shard:  # inputs serve no other shard
            self.clear()
            self._shard = stage.shard
        parent = _parent(stage, parents)
        with enough_memory(self.recipe, f"training stage {stage.key[:12]}"):
            module = self._trained(stage, parent, records, progress)
            # Not the buffers: a mask may well hold infinities.
            if not all(parameter.isfinite().all() for parameter in module.parameters()):
                raise DivergedError("training diverged: lower learning_rate or head_learning_rate, as a new recipe")
            return encode(stage, {name: tensor.clone() for name, tensor in state_of(module).items()})

    def _trained(
        self, stage: Stage, parent: Mapping[str, Tensor] | None, records: Sequence[Record], progress: Progress | None
    ) -> nn.Module:
        # The shard's own seed, whatever its slices hold: all stages of a shard grow from one beginning.
        module = self._network.begin(stage_seed(self.recipe, stage.shard, ()))
        if parent is not None:
            restore(module, parent)
        seed = stage_seed(self.recipe, stage.shard, stage.prefix)
        with seeded(seed):  # the stream that dropout draws from
            self._fit(module, seed, records, progress)
        return module

    def _fit(self, module: nn.Module, seed: int, records: Sequence[Record], progress: Progress | None) -> None:
        """SISA's epochs with a fresh optimizer: its state does not cross a stage boundary."""
        targets = tasks.targets(self.recipe, records)
        by_id = {record.record_id: record for record in records}
        self._network.train(module)
        optimizer = torch.optim.AdamW(self._network.groups(module), weight_decay=self.recipe.weight_decay, fused=True)
        done, total = 0, schedule.steps(len(targets), self._passes, self.recipe.batch_size)
        for order in schedule.epochs(seed, targets, self._passes):
            for batch in schedule.batches(order, self.recipe.batch_size):
                done += 1
                inputs = self._inputs([by_id[record_id] for record_id in batch])
                self._step(module, optimizer, inputs, [targets[record_id] for record_id in batch], done)
                if progress:
                    progress(done, total)

    def _step(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Sequence[Encoded],
        wanted: Sequence[tasks.Target],
        number: int,
    ) -> None:
        codec = self._network.codec
        # The longest length always: a batch's own would make a record's gradient depend on its neighbours.
        rows = codec.collate(inputs, codec.lengths[-1])
        with _normalisable(module, len(inputs)):
            logits = self._network.call(module, rows)
        loss = tasks.loss(self.recipe, logits, wanted)
        if not loss.isfinite():
            raise DivergedError(
                f"the loss is not a number at step {number}: lower learning_rate or head_learning_rate, as a new recipe"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _inputs(self, records: Sequence[Record]) -> list[Encoded]:
        """Inputs of the records as the model takes them; those of another content under the same id anew."""
        fresh: list[Record] = []
        for record in records:
            known = self._encoded.get(record.record_id)
            if known is None or known[0] != record.content_digest:
                self.forget([record.record_id])
                fresh.append(record)
        made = self._network.codec.encode(inputs_of(self.recipe, fresh))
        found = {record.record_id: encoded for record, encoded in zip(fresh, made, strict=True)}
        for record in fresh:
            encoded = found[record.record_id]
            if self.held_bytes + _size(encoded) <= self._cap:
                self._encoded[record.record_id] = (record.content_digest, encoded)
                self.held_bytes += _size(encoded)
        return [found.get(record.record_id) or self._encoded[record.record_id][1] for record in records]


def _size(encoded: Encoded) -> int:
    return 32 * len(encoded.ids) + (0 if encoded.pixels is None else encoded.pixels.nbytes)


def _parent(stage: Stage, parents: Sequence[bytes]) -> Mapping[str, Tensor] | None:
    """The parent's tensors, after checking that it is the stage's own."""
    if stage.parent is None and not parents:
        return None
    found = decode(parents[-1]) if parents else None
    if (
        found is None
        or len(parents) != stage.depth - 1
        or found.stage.key != stage.parent
        or (found.stage.shard, found.stage.prefix, found.stage.roots)
        != (stage.shard, stage.prefix[:-1], stage.roots[:-1])
    ):
        raise ArtifactDigestError(f"stage {stage.key[:12]} was given artefacts that are not its ancestors'")
    return found.tensors


@contextmanager
def _normalisable(module: nn.Module, rows: int) -> Generator[None]:
    """A batch of one record has no variance: batch normalisation uses its running statistics for it."""
    norms = [each for each in module.modules() if isinstance(each, NORMS) and each.training] if rows == 1 else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()
