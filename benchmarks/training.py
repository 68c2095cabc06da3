"""`training`: S3T stages on cached hidden states against the same stages that compute them again at each step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import children, data
from benchmarks.data import Shard
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from shards.engine.backbone import Backbone
from shards.engine.s3t import S3T
from shards.engine.trunk import Trunk
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage

RECORDS = 160
"""Of the one shard; the ratio hardly depends on it."""
REPEATS, REPEATS_FULL = 1, 3


@dataclass(frozen=True, slots=True)
class Job:
    """What the measuring process is given."""

    recipe: Recipe
    shard: Shard
    repeats: int


@dataclass(slots=True)
class Seconds:
    """Wall time of all stages."""

    cached: float = 0.0
    recomputed: float = 0.0


class _Forgetful(Trunk):
    """A trunk that keeps nothing, and knows how long it tried to."""

    def __init__(self, backbone: Backbone, recipe: Recipe) -> None:
        super().__init__(backbone, recipe, cache_bytes=0)
        self.warming = 0.0

    def warm(self, records: Any, boundary: int) -> None:
        """Tokenises; and computes one batch that it then finds no room for, which recomputing would not."""
        began = time.perf_counter()
        super().warm(records, boundary)
        self.warming += time.perf_counter() - began


def measure(screen: Screen, *, full: bool) -> Measured:
    """Train every stage of both orders in both ways, alternately, in one process."""
    recipe = data.recipe(shards=1, orders=2, precision="float32")
    sample = data.draw(RECORDS)
    (shard,) = data.partition(sample.training, shards=1, slices=recipe.slices, seed=recipe.seed)
    repeats = REPEATS_FULL if full else REPEATS
    stages = [stage for order in recipe.slice_orders for stage in shard.chain(recipe, order)]
    with screen.bar("training stages with cached and with recomputed hidden states", repeats * len(stages)) as advance:
        (found,) = children.run(compare, [Job(recipe, shard, repeats)], processes=1, advance=advance)
    return Measured(
        {
            "trunk_speedup": found.recomputed / found.cached,
            "cached_s": found.cached / repeats,
            "recomputed_s": found.recomputed / repeats,
        },
        {
            "backbone": "all-MiniLM-L6-v2: 6 layers, of which trunk 3",
            "records": len(sample.training),
            "stages": len(stages),
            "repeats": repeats,
            "threads": 1,
            **{name: getattr(recipe, name) for name in ("slices", "orders", "epochs", "batch_size", "max_tokens")},
            "precision": recipe.precision,
            "note": "cached_s holds the one computation of the hidden states; both ways gave the same bits",
        },
    )


def compare(job: Job) -> Seconds:
    """In a process of its own: each stage by one engine and then by the other, the first one changing."""
    backbone = Backbone.load(job.recipe)
    cached, recomputing = S3T(job.recipe, backbone), S3T(job.recipe, backbone, cache_bytes=0)
    forgetful = recomputing.trunk = _Forgetful(backbone, job.recipe)
    _warm_up(cached, job)
    _warm_up(recomputing, job)
    forgetful.warming = 0.0
    seconds = Seconds()
    for repeat in range(job.repeats):
        for order in job.recipe.slice_orders:
            parents: list[bytes] = []
            for stage in job.shard.chain(job.recipe, order):
                records = job.shard.read_by(stage)
                engines = [cached, recomputing] if (stage.depth + repeat) % 2 else [recomputing, cached]
                made = {id(engine): _timed(engine, stage, records, parents) for engine in engines}
                (data_kept, kept), (data_again, again) = made[id(cached)], made[id(recomputing)]
                if data_kept != data_again:
                    raise BenchmarkError(f"stage {stage.key[:12]} has other bits without the cache; report this")
                seconds.cached += kept
                seconds.recomputed += again
                parents.append(data_kept)
                children.tick()
        cached.trunk.clear()
        recomputing.trunk.clear()
    seconds.recomputed -= forgetful.warming
    return seconds


def _warm_up(engine: S3T, job: Job) -> None:
    """A few steps outside the clock: the first ones allocate memory and choose kernels."""
    stage = job.shard.chain(job.recipe, job.recipe.slice_orders[0])[0]
    engine.train(stage, job.shard.read_by(stage)[: job.recipe.batch_size], [])
    engine.trunk.clear()


def _timed(engine: S3T, stage: Stage, records: Sequence[Record], parents: Sequence[bytes]) -> tuple[bytes, float]:
    began = time.perf_counter()
    made = engine.train(stage, records, parents)
    return made, time.perf_counter() - began
