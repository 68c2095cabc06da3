"""`accuracy`: the S3T ensemble at each depth against one model on everything, on held-out stand-in reviewers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from benchmarks import children, data
from benchmarks.data import Shard
from benchmarks.results import Measured
from service.cli.demo.sample import Review
from service.cli.demo.show import Screen
from shards.assembly import Member as Line
from shards.digest import sha256_hex
from shards.engine.backbone import Backbone
from shards.engine.ensemble import StageTensors
from shards.engine.s3t import S3T
from shards.engine.skeleton import Member, Prepared, Skeleton
from shards.logits import Logits, mean_of_logits
from shards.recipe import Recipe

TRAINING, HELD_OUT = 2000, 1600
SEEDS, SEEDS_FULL = 1, 5
"""A seed decides initialisation, order of records and partition; the reviewers in each part stay the same."""
STUDENT = {1: 0.0, 5: 2.776}
"""97.5 % quantile of Student's t by number of seeds; one seed says nothing about another."""
CHUNK = 100
"""Held-out texts per step of the progress bar."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to train, or one model on everything."""

    recipe: Recipe
    shard: Shard
    texts: tuple[str, ...]
    """The held-out ones."""
    whole: bool
    """Whether `shard` is no shard, but has everything as its only slice."""


def measure(screen: Screen, *, full: bool) -> Measured:
    """Train both kinds of model for each seed, two processes of one thread at work, and compare their answers."""
    seeds = SEEDS_FULL if full else SEEDS
    sample = data.draw(TRAINING, HELD_OUT)
    right = [_seed(screen, seed, sample.training, sample.held_out) for seed in range(seeds)]
    whole = np.array([found[0] for found in right], float)  # (seeds, records)
    depths = np.array([found[1] for found in right], float)  # (seeds, depths, records)
    difference = whole - depths[:, -1]
    stderr, margin = _spread(difference, [review.reviewer for review in sample.held_out])
    gap = float(difference.mean())
    recipe = data.recipe(orders=1)
    return Measured(
        {
            "monolithic": float(whole.mean()),
            "s3t": float(depths[:, -1].mean()),
            **{f"s3t_depth_{depth}": float(depths[:, depth - 1].mean()) for depth in range(1, depths.shape[1] + 1)},
            "gap": gap,
            "gap_low": gap - margin,
            "gap_high": gap + margin,
            "stderr": stderr,
        },
        {
            "training_records": len(sample.training),
            "held_out_records": len(sample.held_out),
            "held_out_reviewers": len({review.reviewer for review in sample.held_out}),
            "seeds": seeds,
            "shards": recipe.shards,
            **{name: getattr(recipe, name) for name in ("slices", "orders", "epochs", "batch_size", "max_tokens")},
            "precision": recipe.precision,
            "note": "gap = monolithic - s3t on the same records; stderr is the gap's, clustered by stand-in reviewer"
            " and, with several seeds, their spread added; gap_low and gap_high bound 95 %",
        },
    )


def _seed(
    screen: Screen, seed: int, training: Sequence[Review], held_out: Sequence[Review]
) -> tuple[Bools, list[Bools]]:
    """Which held-out records the one model gets right, and the ensemble at depth 1, 2, ..."""
    recipe = data.recipe(orders=1, seed=seed)
    texts = tuple(review.text for review in held_out)
    shards = data.partition(training, shards=recipe.shards, slices=recipe.slices, seed=seed)
    everything = Shard(-1, {0: [data.record(review) for review in training]})
    jobs = [Job(recipe, everything, texts, whole=True), *(Job(recipe, each, texts, whole=False) for each in shards)]
    with screen.bar(f"one model and {len(shards)} shards, seed {seed}", sum(map(_ticks, jobs))) as advance:
        (whole,), *parts = children.run(train, jobs, processes=2, advance=advance)
    labels = np.array([recipe.classes.index(review.label) for review in held_out])

    def right(logits: Logits) -> Bools:
        return logits.argmax(axis=1) == labels

    return right(whole), [right(mean_of_logits(list(shard))) for shard in zip(*parts, strict=True)]


def train(job: Job) -> list[Logits]:
    """In a process of its own: the held-out logits of each stage of the shard, or of the one model."""
    engine, skeleton = _engine(job.recipe)
    tensors = StageTensors(job.recipe)
    members: list[Member] = []
    if job.whole:
        members.append(tensors.member_of(engine.train_whole(job.shard.slices[0], _step)))
    else:
        artifacts: list[bytes] = []
        for stage in job.shard.chain(job.recipe, job.recipe.slice_orders[0]):
            artifacts.append(engine.train(stage, job.shard.read_by(stage), artifacts, _step))
            digests = tuple(map(sha256_hex, artifacts))
            tensors.add(digests[-1], artifacts[-1])
            members.append(tensors.member(Line(stage.key, stage.prefix, digests)))
        engine.trunk.clear()
    chunks: list[list[Logits]] = []
    for chunk in _prepared(skeleton, job.texts):
        chunks.append(skeleton.answer(members, chunk))
        children.tick()
    return [np.concatenate(parts) for parts in zip(*chunks, strict=True)]


@lru_cache(maxsize=1)
def _engine(recipe: Recipe) -> tuple[S3T, Skeleton]:
    backbone = Backbone.load(recipe)
    return S3T(recipe, backbone), Skeleton(recipe, backbone)


@lru_cache(maxsize=1)
def _prepared(skeleton: Skeleton, texts: tuple[str, ...]) -> list[Prepared]:
    """The held-out texts behind the trunk, in chunks; an answer depends on its own text alone."""
    members = skeleton.recipe.slices
    return [skeleton.prepare(texts[at : at + CHUNK], members) for at in range(0, len(texts), CHUNK)]


def _step(_done: int, _total: int) -> None:
    children.tick()


def _ticks(job: Job) -> int:
    """Optimizer steps and chunks of answers."""
    slices = [len(records) for _, records in sorted(job.shard.slices.items())]
    read = [sum(slices[: depth + 1]) for depth in range(len(slices))]
    steps = sum(math.ceil(rows / job.recipe.batch_size) for rows in read)
    return job.recipe.epochs * steps + math.ceil(len(job.texts) / CHUNK)


def _spread(difference: NDArray[np.float64], clusters: Sequence[str]) -> tuple[float, float]:
    """Standard error of the mean over (seeds, records), and half the width of its 95 % interval.

    Records of one cluster count as one observation of several; what seeds add is added to it as if independent.
    """
    seeds, records = difference.shape
    centred = difference.mean(axis=0) - difference.mean()
    _, place = np.unique(np.array(clusters), return_inverse=True)
    of_records = math.sqrt(float((np.bincount(place, centred) ** 2).sum())) / records
    of_seeds = float(difference.mean(axis=1).std(ddof=1)) / math.sqrt(seeds) if seeds > 1 else 0.0
    return math.hypot(of_records, of_seeds), math.hypot(1.96 * of_records, STUDENT[seeds] * of_seeds)
