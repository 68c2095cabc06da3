"""`merged`: how fast one adapter of all shards' factors answers, against the adapter of one model."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import adapters, children, data
from benchmarks.data import Shard
from benchmarks.results import Measured
from service.cli.demo.show import Screen
from shards.assembly import Assembly
from shards.merged import Tensors
from shards.recipe import Recipe

RECORDS = 100
"""Trained on; how well is of no concern here."""
BATCHES = (1, 8, 32)
REPEATS, REPEATS_FULL = 20, 60


@dataclass(frozen=True, slots=True)
class Job:
    """What the measuring process is given."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    texts: tuple[str, ...]
    repeats: int


@dataclass(frozen=True, slots=True)
class Ratios:
    """Speed of merged over one model's, by batch size."""

    peft: dict[int, float]
    """Both as adapter directories that plain peft loads."""
    here: dict[int, float]
    """Both in the model server's code."""


def measure(screen: Screen, *, full: bool) -> Measured:
    """Time both in one process, alternately."""
    recipe = data.recipe(orders=1, epochs=1, precision="float32")
    sample = data.draw(RECORDS, 100)
    shards = data.partition(sample.training, shards=recipe.shards, slices=recipe.slices, seed=recipe.seed)
    texts = tuple(review.text for review in sample.held_out[: max(BATCHES)])
    job = Job(recipe, tuple(shards), texts, REPEATS_FULL if full else REPEATS)
    with screen.bar("answers by merged and by one model", 2 * len(BATCHES)) as advance:
        (found,) = children.run(compare, [job], processes=1, advance=advance)
    return Measured(
        {
            "over_one": min(found.peft.values()),
            "over_one_here": min(found.here.values()),
            **{f"over_one_batch_{size}": ratio for size, ratio in found.peft.items()},
        },
        {
            "shards": recipe.shards,
            "rank": recipe.shards * recipe.lora.rank,
            "rank_of_one": recipe.lora.rank,
            "batches": list(BATCHES),
            "repeats": job.repeats,
            "threads": 1,
            "precision": recipe.precision,
            "note": "over_one: plain peft, the least of the batch sizes; over_one_here: the model server's code",
        },
    )


def compare(job: Job) -> Ratios:
    """In a process of its own: train a full-depth stage of each shard, and time both adapters."""
    trained = adapters.train(job.recipe, job.shards)
    digest = job.recipe.digest
    one = trained.reader.build(Assembly(digest, trained.members[:1]))
    whole = trained.reader.build(Assembly(digest, trained.members, "merged"))
    here: dict[int, float] = {}
    for size in BATCHES:
        texts = job.texts[:size]
        here[size] = _ratio(lambda: one.logits(texts), lambda: whole.logits(texts), job.repeats)  # noqa: B023
        children.tick()
    return Ratios(_by_peft(job, trained.lines), here)


def _by_peft(job: Job, lines: Sequence[Sequence[Tensors]]) -> dict[int, float]:
    from transformers import AutoTokenizer  # noqa: PLC0415 - in the child only

    with TemporaryDirectory() as directory:
        models = [
            adapters.load(job.recipe, some, Path(directory, name))
            for name, some in (("one", lines[:1]), ("merged", lines))
        ]
    tokenizer = AutoTokenizer.from_pretrained(job.recipe.pretrained.source, local_files_only=True)
    found: dict[int, float] = {}
    for size in BATCHES:
        tokens = tokenizer(
            list(job.texts[:size]), padding="max_length", truncation=True, max_length=64, return_tensors="pt"
        )
        one, whole = (_asking(model, tokens) for model in models)
        found[size] = _ratio(one, whole, job.repeats)
        children.tick()
    return found


def _asking(model: Any, tokens: Any) -> Callable[[], object]:
    import torch  # noqa: PLC0415

    def ask() -> object:
        with torch.inference_mode():
            return model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits

    return ask


def _ratio(one: Callable[[], object], whole: Callable[[], object], repeats: int) -> float:
    """Median time of the one over that of the other, alternately taken, the first of each outside the clock."""
    one()
    whole()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for ask, kept in ((one, times[0]), (whole, times[1])):
            began = time.perf_counter()
            ask()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]) / statistics.median(times[1])
