"""Models of every engine trained and asked in processes of their own, one thread each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks import children
from benchmarks.data import Shard
from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.ensemble import Monolithic, StageTensors
from shards.engine.interface import Reader, Trainer
from shards.engine.registry import open_reader, open_trainer
from shards.engine.s3t import S3T
from shards.engine.skeleton import Skeleton
from shards.logits import Logits
from shards.recipe import Recipe

CHUNK = 100
"""Held-out texts per step of the progress bar."""


@dataclass(frozen=True, slots=True)
class Whole:
    """One model on everything: the adapters of all blocks at once."""

    recipe: Recipe
    shard: Shard
    """No shard: it has every record, as its only slice."""
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """The first order of one shard, every stage of it asked."""

    recipe: Recipe
    shard: Shard
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sums:
    """Engine `ridge`: all cells of all shards, solved together."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """An assembly of stages that were trained elsewhere."""

    recipe: Recipe
    lines: tuple["Line", ...]
    """One per shard."""
    aggregation: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """A shard's stage with its ancestors."""

    member: Member
    artifacts: tuple[bytes, ...]
    """Shortest prefix first."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What a job says of the held-out texts."""

    logits: list[Logits]
    """Of a chain, stage after stage; else the one model's."""
    lines: tuple[Line, ...] = ()
    """Of a chain, stage after stage."""


Job = Whole | Chain | Sums | Served


def work(job: Job) -> Answers:
    """In a process of its own: train what the job says, and ask it the held-out texts."""
    match job:
        case Whole():
            return _whole(job)
        case Chain():
            return _chain(job)
        case Sums():
            return _sums(job)
        case Served():
            reader = _reader(job.recipe)
            _load(reader, job.lines)
            members = tuple(line.member for line in job.lines)
            return Answers([_asked(reader, Assembly(job.recipe.digest, members, job.aggregation), job.texts)])


def ticks(job: Job) -> int:
    """Steps of training and chunks of answers: what `work` counts."""
    chunks = math.ceil(len(job.texts) / CHUNK)
    match job:
        case Whole():
            return _steps(job.recipe, [sum(map(len, job.shard.slices.values()))]) + chunks
        case Chain():
            sizes = [len(records) for _, records in sorted(job.shard.slices.items())]
            return _steps(job.recipe, [sum(sizes[: depth + 1]) for depth in range(len(sizes))]) + chunks * len(sizes)
        case Sums():
            return sum(len(records) for shard in job.shards for records in shard.slices.values()) + chunks
        case Served():
            return chunks


def _whole(job: Whole) -> Answers:
    trainer = S3T(job.recipe)
    tensors = trainer.train_whole(job.shard.slices[0], _step)
    model = Monolithic(Skeleton(job.recipe, trainer.backbone), StageTensors(job.recipe), tensors)
    parts: list[Logits] = []
    for at in range(0, len(job.texts), CHUNK):
        parts.append(model.logits(job.texts[at : at + CHUNK]))
        children.tick()
    return Answers([np.concatenate(parts)])


def _chain(job: Chain) -> Answers:
    trainer, reader = _trainer(job.recipe), _reader(job.recipe)
    artifacts: list[bytes] = []
    lines: list[Line] = []
    for stage in job.shard.chain(job.recipe, job.recipe.slice_orders[0]):
        artifacts.append(trainer.train(stage, job.shard.read_by(stage), artifacts, _step))
        member = Member(stage.key, stage.prefix, tuple(map(sha256_hex, artifacts)))
        lines.append(Line(member, tuple(artifacts)))
    trainer.clear()
    _load(reader, lines)
    digest = job.recipe.digest
    logits = [_asked(reader, Assembly(digest, (line.member,)), job.texts) for line in lines]
    reader.drop(reader.held())
    return Answers(logits, tuple(lines))


def _sums(job: Sums) -> Answers:
    trainer, reader = _trainer(job.recipe), _reader(job.recipe)
    members: list[Member] = []
    for shard in job.shards:
        for order in job.recipe.slice_orders:
            (stage,) = shard.chain(job.recipe, order)
            records = shard.read_by(stage)
            data = trainer.train(stage, records, [])
            children.tick(len(records))
            reader.load(sha256_hex(data), data)
            members.append(Member(stage.key, stage.prefix, (sha256_hex(data),)))
    trainer.clear()
    return Answers([_asked(reader, Assembly(job.recipe.digest, tuple(members), job.recipe.rule), job.texts)])


def _asked(reader: Reader, assembly: Assembly, texts: Sequence[str]) -> Logits:
    predictor = reader.build(assembly)
    parts: list[Logits] = []
    for chunk in _prepared(reader, tuple(texts)):
        parts.append(predictor.answer(chunk))
        children.tick()
    return np.concatenate(parts)


def _load(reader: Reader, lines: Sequence[Line]) -> None:
    for line in lines:
        for digest, data in zip(line.member.artifacts, line.artifacts, strict=True):
            reader.load(digest, data)


@lru_cache(maxsize=1)
def _trainer(recipe: Recipe) -> Trainer:
    return open_trainer(recipe)


@lru_cache(maxsize=1)
def _reader(recipe: Recipe) -> Reader:
    return open_reader(recipe, trainer=_trainer(recipe))


@lru_cache(maxsize=1)
def _prepared(reader: Reader, texts: tuple[str, ...]) -> list[Any]:
    """The held-out texts behind the trunk, in chunks; an answer depends on its own text alone."""
    return [reader.prepare(texts[at : at + CHUNK]) for at in range(0, len(texts), CHUNK)]


def _step(_done: int, _total: int) -> None:
    children.tick()


def _steps(recipe: Recipe, read: Sequence[int]) -> int:
    """Optimizer steps of stages that read so many records; SISA's epochs are spread over its stages."""
    epochs = 2 * recipe.epochs / (len(read) + 1) if recipe.engine == "sisa" else recipe.epochs
    return round(sum(epochs * math.ceil(rows / recipe.batch_size) for rows in read))
