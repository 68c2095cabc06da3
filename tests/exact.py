"""What the tests of exactness share: chains of stages, what a model answers, and traces of a training."""

import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import torch
from hypothesis import Phase
from tiny import World, manifest_root
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shards.engine.interface import Input, Trainer, check_lineage
from shards.engine.registry import open_reader
from shards.logits import Logits
from shards.manifest import Record
from shards.stages import Stage, chain

FEW: Any = {
    "deadline": None,
    "derandomize": True,
    "phases": (Phase.explicit, Phase.generate),  # shrinking would train for minutes
}
"""Hypothesis settings of tests that train."""
Slices = Mapping[int, Sequence[Record]]


def stages_of(engine: Trainer, slices: Slices, order: Sequence[int], shard: int = 0) -> tuple[Stage, ...]:
    """The chain of an order on these records."""
    return chain(engine.recipe.digest, shard, order, {piece: manifest_root(list(rs)) for piece, rs in slices.items()})


def train_chain(engine: Trainer, slices: Slices, order: Sequence[int], shard: int = 0) -> list[bytes]:
    """Artefacts of every stage of an order, trained one after the other."""
    artifacts: list[bytes] = []
    for stage in stages_of(engine, slices, order, shard):
        records = check_lineage(stage, {piece: slices[piece] for piece in stage.prefix})
        artifacts.append(engine.train(stage, records, artifacts))
    return artifacts


def served(world: World, inputs: Sequence[Input]) -> Logits:
    """What the world's assembly answers."""
    reader = open_reader(world.recipe, trainer=world.engine)
    for digest, data in world.artifacts.items():
        reader.load(digest, data)
    return reader.build(world.assembly()).logits(inputs)


@dataclass
class Trace:
    """What a stage did while it was trained."""

    shown: list[list[UUID]] = field(default_factory=list)
    """Record ids by optimizer step."""
    start: list[list[torch.Tensor]] = field(default_factory=list)
    """The trained tensors as training began, by group of the optimizer: of engine `s3t` the block, then the head."""
    stream: list[str] = field(default_factory=list)
    """By optimizer step the state of the generator that dropout drew from."""

    @property
    def order(self) -> list[UUID]:
        """Record ids as they were shown."""
        return [record_id for batch in self.shown for record_id in batch]


@contextmanager
def traced(engine: Any) -> Generator[Trace]:
    """Follow one training of engine `s3t` or `sisa`, from the optimizer's side and from where its rows are made."""
    trace = Trace()
    owner, name = (engine.trunk, "rows") if hasattr(engine, "trunk") else (engine, "_inputs")
    real = getattr(owner, name)

    def rows(given: Iterable[Any], *rest: Any) -> Any:
        given = list(given)
        trace.shown.append([getattr(each, "record_id", each) for each in given])
        return real(given, *rest)

    def step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        trace.stream.append(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        if not trace.start:
            groups = (group["params"] for group in optimizer.param_groups)
            trace.start = [[tensor.detach().clone() for tensor in group] for group in groups]

    hook = register_optimizer_step_pre_hook(step)
    setattr(owner, name, rows)
    try:
        yield trace
    finally:
        delattr(owner, name)
        hook.remove()


def trace_chain(engine: Trainer, slices: Slices, order: Sequence[int], shard: int = 0) -> list[Trace]:
    """Traces of every stage of an order."""
    artifacts: list[bytes] = []
    traces: list[Trace] = []
    for stage in stages_of(engine, slices, order, shard):
        with traced(engine) as trace:
            records = [record for piece in stage.prefix for record in slices[piece]]
            artifacts.append(engine.train(stage, records, artifacts))
        traces.append(trace)
    return traces
