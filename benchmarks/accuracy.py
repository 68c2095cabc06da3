"""`accuracy`: every engine and aggregation against one model on everything, on held-out stand-in reviewers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from benchmarks import children, data
from benchmarks.data import Shard
from benchmarks.learners import Answers, Chain, Job, Line, Served, Sums, Whole, ticks, work
from benchmarks.results import Measured
from service.cli.demo.sample import Review
from service.cli.demo.show import Screen
from shards.logits import Logits, mean_of_logits
from shards.recipe import Ridge

TRAINING, HELD_OUT = 2000, 1600
SEEDS, SEEDS_FULL = 1, 3
"""A seed decides initialisation, order of records and partition; the reviewers in each part stay the same."""
STUDENT = {1: 0.0, 3: 4.303}
"""97.5 % quantile of Student's t by number of seeds; one seed says nothing about another."""
MIXED = (3, 2, 1, 2)
"""Depths of the four shards after some deletions."""
SISA_RATE = 5e-5
"""Learning rate where all parameters are trained."""

Bools = NDArray[np.bool_]
Right = dict[str, Bools]
"""Which held-out records each model gets right."""


def measure(screen: Screen, *, full: bool) -> Measured:
    """Train all kinds of model for each seed, two processes of one thread at work, and compare their answers."""
    seeds = SEEDS_FULL if full else SEEDS
    sample = data.draw(TRAINING, HELD_OUT)
    found = [_seed(screen, seed, sample.training, sample.held_out) for seed in range(seeds)]
    right = {name: np.array([each[name] for each in found], float) for name in found[0]}  # (seeds, records)
    reviewers = [review.reviewer for review in sample.held_out]
    figures = {name: float(each.mean()) for name, each in right.items()}
    for name, other in (
        ("s3t", "monolithic"),
        ("merged", "monolithic"),
        ("sisa", "monolithic"),
        ("ridge", "monolithic"),
        ("merged_mixed", "s3t_mixed"),
    ):
        figures |= _gap(name, right[other] - right[name], reviewers)
    figures["stderr"] = figures["s3t_gap_stderr"]
    recipe = data.recipe(orders=1)
    return Measured(
        figures,
        {
            "training_records": len(sample.training),
            "held_out_records": len(sample.held_out),
            "held_out_reviewers": len(set(reviewers)),
            "seeds": seeds,
            "shards": recipe.shards,
            **{name: getattr(recipe, name) for name in ("slices", "orders", "epochs", "batch_size", "max_tokens")},
            "precision": recipe.precision,
            "mixed_depths": MIXED[: recipe.shards],
            "note": "X_gap = the one model on everything minus X, on the same records (merged_mixed_gap: the ensemble"
            " at the same mixed depths minus merged); X_gap_stderr is clustered by stand-in reviewer and, with several"
            " seeds, their spread added; X_gap_low and X_gap_high bound 95 %; stderr is s3t's",
        },
    )


def _seed(screen: Screen, seed: int, training: Sequence[Review], held_out: Sequence[Review]) -> Right:
    recipe = data.recipe(orders=1, seed=seed)
    sisa = replace(recipe, engine="sisa", learning_rate=SISA_RATE)
    ridge = replace(recipe, engine="ridge", ridge=Ridge(), precision="float32")
    texts = tuple(review.text for review in held_out)
    shards = data.partition(training, shards=recipe.shards, slices=recipe.slices, seed=seed)
    everything = Shard(-1, {0: [data.record(review) for review in training]})
    jobs: dict[str, list[Job]] = {
        "monolithic": [Whole(recipe, everything, texts)],
        "ridge": [Sums(ridge, tuple(shards), texts)],
        "s3t": [Chain(recipe, shard, texts) for shard in shards],
        "sisa": [Chain(sisa, shard, texts) for shard in shards],
    }
    found = _work(screen, f"monolithic, ridge, s3t, sisa, seed {seed}", jobs)
    chains = [answers.lines for answers in found["s3t"]]
    served: dict[str, list[Job]] = {
        "merged": [Served(recipe, tuple(chain[-1] for chain in chains), "merged", texts)],
        "merged_mixed": [Served(recipe, _mixed(chains), "merged", texts)],
        "s3t_mixed": [Served(recipe, _mixed(chains), "logits", texts)],
    }
    found |= _work(screen, f"merged, seed {seed}", served)
    labels = np.array([recipe.classes.index(review.label) for review in held_out])
    answers = _answers(found)
    return {name: logits.argmax(axis=1) == labels for name, logits in answers.items()}


def _work(screen: Screen, title: str, jobs: Mapping[str, Sequence[Job]]) -> dict[str, list[Answers]]:
    flat = [job for each in jobs.values() for job in each]
    with screen.bar(title, sum(map(ticks, flat))) as advance:
        done = iter(children.run(work, flat, processes=2, advance=advance))
    return {name: [next(done) for _ in each] for name, each in jobs.items()}


def _answers(found: Mapping[str, Sequence[Answers]]) -> dict[str, Logits]:
    """Logits of each model: means over the shards of a chain at its full depth, and of s3t at each depth."""
    single = {name: each[0].logits[0] for name, each in found.items() if name not in {"s3t", "sisa"}}
    by_depth = [mean_of_logits(list(shard)) for shard in zip(*(each.logits for each in found["s3t"]), strict=True)]
    depths = {f"s3t_depth_{depth}": logits for depth, logits in enumerate(by_depth, 1)}
    sisa = mean_of_logits([each.logits[-1] for each in found["sisa"]])
    return single | depths | {"s3t": by_depth[-1], "sisa": sisa}


def _mixed(chains: Sequence[Sequence[Line]]) -> tuple[Line, ...]:
    return tuple(chain[min(depth, len(chain)) - 1] for chain, depth in zip(chains, MIXED, strict=True))


def _gap(name: str, difference: NDArray[np.float64], clusters: Sequence[str]) -> dict[str, float]:
    stderr, margin = _spread(difference, clusters)
    gap = float(difference.mean())
    return {
        f"{name}_gap": gap,
        f"{name}_gap_stderr": stderr,
        f"{name}_gap_low": gap - margin,
        f"{name}_gap_high": gap + margin,
    }


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
