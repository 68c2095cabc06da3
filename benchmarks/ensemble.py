"""`ensemble`: how fast S shards answer in one pass over one backbone, against S separate peft models in a loop.

The bound is what the layers alone allow: S * D of them for separate models, T + S * (D - T) for the ensemble, whose
trunk of T layers runs once. It can be passed, since more than the trunk is shared (facts/training.md, section 4).
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import adapters, children, data
from benchmarks.data import Shard
from benchmarks.results import BenchmarkError, Measured
from service.cli.demo.show import Screen
from shards.assembly import Assembly
from shards.recipe import Recipe

RECORDS = 60
"""Trained on; how well is of no concern here."""
SHARDS = (4, 8)
BATCHES = (1, 8, 32)
ROUNDS, ROUNDS_FULL = 9, 25
"""Of batch 32; smaller ones take more, for they vary more."""
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Job:
    """What a measuring process is given."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    texts: tuple[str, ...]
    rounds: int


@dataclass(frozen=True, slots=True)
class Found:
    """One number of shards."""

    of_bound: dict[int, float]
    """By batch size: the speed-up over separate models, over the bound."""
    speed_up: dict[int, float]
    layers: int
    trunk: int
    memory: float
    """Bytes of the ensemble's weights over one model's with its adapter."""
    difference: float
    """Largest difference of a logit."""


def measure(screen: Screen, *, full: bool) -> Measured:
    """Time both in one process for each number of shards, round by round."""
    sample = data.draw(RECORDS, 400)
    jobs: list[Job] = []
    for count in SHARDS:
        recipe = data.recipe(shards=count, orders=1, epochs=1, precision="float32")
        shards = data.partition(sample.training, shards=count, slices=recipe.slices, seed=recipe.seed)
        texts = tuple(review.text for review in sample.held_out)
        jobs.append(Job(recipe, tuple(shards), texts, ROUNDS_FULL if full else ROUNDS))
    with screen.bar("answers by an ensemble and by separate models", len(jobs) * len(BATCHES)) as advance:
        found = children.run(compare, jobs, processes=1, advance=advance)
    cells = {(count, size): each.of_bound[size] for count, each in zip(SHARDS, found, strict=True) for size in BATCHES}
    first = jobs[0].recipe
    return Measured(
        {
            "of_bound": min(cells.values()),
            "memory_over_one": max(each.memory for each in found),
            **{f"of_bound_{count}_batch_{size}": ratio for (count, size), ratio in cells.items()},
            "largest_difference": max(each.difference for each in found),
        },
        {
            "shards": list(SHARDS),
            "batches": list(BATCHES),
            "layers": found[0].layers,
            "trunk": found[0].trunk,
            "tokens": first.max_tokens,
            "rank": first.lora.rank,
            "rounds": jobs[0].rounds,
            "threads": 1,
            "precision": first.precision,
            "speed_up": {f"{n}": {f"{b}": f.speed_up[b] for b in BATCHES} for n, f in zip(SHARDS, found, strict=True)},
            "note": "of_bound: median time of S separate peft models over the ensemble's, over S*D/(T+S*(D-T)), the "
            "least of all; both tokenise; every text fills the padded length",
        },
    )


def compare(job: Job) -> Found:
    """In a process of its own: train a full-depth stage of each shard, and time both ways of asking all of them.

    Raises:
        BenchmarkError: they disagree, or too few texts fill the padded length.
    """
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415 - in the child only

    recipe = job.recipe
    trained = adapters.train(recipe, job.shards)
    ensemble = trained.reader.build(Assembly(recipe.digest, trained.members))
    with TemporaryDirectory() as directory:
        models = [adapters.load(recipe, [line], Path(directory, str(n))) for n, line in enumerate(trained.lines)]
    tokenizer = AutoTokenizer.from_pretrained(recipe.pretrained.source, local_files_only=True)
    texts = [text for text in job.texts if len(tokenizer(text).input_ids) >= recipe.max_tokens][: max(BATCHES)]
    if len(texts) < max(BATCHES):
        raise BenchmarkError(f"only {len(texts)} texts of {recipe.max_tokens} tokens: draw more")
    depth = AutoConfig.from_pretrained(recipe.pretrained.source, local_files_only=True).num_hidden_layers
    trunk = depth - recipe.slices * recipe.layers_per_slice
    bound = len(models) * depth / (trunk + len(models) * (depth - trunk))
    separately = _separate(models, tokenizer, recipe.max_tokens)
    difference = float(np.abs(separately(texts) - ensemble.logits(texts)).max())
    if difference > TOLERANCE:
        raise BenchmarkError(f"the ensemble's logits differ from the separate models' by {difference}")
    speed_up: dict[int, float] = {}
    for size in BATCHES:
        some, rounds = texts[:size], job.rounds * (1 if size == max(BATCHES) else 3)
        speed_up[size] = _ratio(lambda: separately(some), lambda: ensemble.logits(some), rounds)  # noqa: B023
        children.tick()
    of_bound = {size: ratio / bound for size, ratio in speed_up.items()}
    return Found(of_bound, speed_up, depth, trunk, _memory(models[0], trained.lines), difference)


def _separate(models: Sequence[Any], tokenizer: Any, length: int) -> Callable[[Sequence[str]], Any]:
    import torch  # noqa: PLC0415

    def ask(texts: Sequence[str]) -> Any:
        tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            logits = [model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]) for model in models]
            return torch.stack([each.logits for each in logits]).mean(0).numpy()

    return ask


def _memory(one: Any, lines: Sequence[Sequence[Any]]) -> float:
    """A model with its adapter, and one backbone with every shard's tensors."""
    own = sum(tensor.nbytes for stage in lines[0] for tensor in _served(lines[0], stage))
    whole = sum(parameter.nbytes for name, parameter in one.named_parameters() if "original_module" not in name)
    shards = sum(tensor.nbytes for line in lines for stage in line for tensor in _served(line, stage))
    return (whole - own + shards) / whole


def _served(line: Sequence[Any], stage: Any) -> list[Any]:
    """Of a stage what stays in use: its factors, and the last one's head."""
    return [tensor for name, tensor in stage.items() if ".lora_" in name or stage is line[-1]]


def _ratio(separate: Callable[[], object], together: Callable[[], object], rounds: int) -> float:
    """Median time of the one over that of the other, alternately taken, the first of each outside the clock."""
    separate()
    together()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for ask, kept in ((separate, times[0]), (together, times[1])):
            began = time.perf_counter()
            ask()
            kept.append(time.perf_counter() - began)
    return statistics.median(times[0]) / statistics.median(times[1])
