"""Evaluation of a stage when it is published: its logits on the model's evaluation set, kept as an artefact.

They are derived from training data, so they are doomed and destroyed with their stage. A preview adds them up exactly
as the ensemble would.
"""

from functools import lru_cache
from typing import Any
from uuid import uuid4

import numpy as np

from service.store import cells, evaluations, fits, jobs, objects, payloads
from service.store.artifacts import Artifacts
from service.store.database import transaction
from service.store.jobs import Job
from service.store.models import Model
from shards.assembly import Assembly, Member
from shards.digest import digest_of, sha256_hex
from shards.engine.interface import Reader, Trainer, inputs_of
from shards.engine.registry import open_reader
from shards.logits import Logits
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage
from shards.sums import Grid
from workers.context import Context


def write(
    context: Context,
    engine: Trainer,
    model: Model,
    job: Job,
    stage: Stage,
    chain: list[bytes],
    platform: dict[str, str],
) -> list[str]:
    """Evaluate the newest stage of `chain`; the new object's name, or nothing where no accuracy is measured."""
    recipe = engine.recipe
    if model.evaluation_id is None or recipe.task != "classification" or recipe.engine == "external":
        return []
    with transaction(context.pool) as connection:
        root = evaluations.evaluation_root(connection, model.evaluation_id)
        found = cells.list_cells(connection, model.evaluation_id)
    records = read_records(context.artifacts, root, tuple(cell.object_name for cell in found if cell.object_name))
    if not records:
        return []
    data = _body(_reader(engine, context.settings.device), recipe, stage, chain, records, root)
    name = f"evaluations/{job.stage_key}/{sha256_hex(data)}/{uuid4()}.safetensors"
    with transaction(context.pool) as connection:
        if not jobs.lock_claimed(connection, job):
            return []
        objects.insert_writing(
            connection,
            name,
            kind="evaluation",
            stage_key=job.stage_key,
            digest=sha256_hex(data),
            size=len(data),
            fingerprint=digest_of(platform),
        )
    context.artifacts.put(name, data)
    return [name]


def forget() -> None:
    """Let go of the engine whose stages were evaluated last."""
    _reader.cache_clear()
    _prepared.cache_clear()


def _body(
    reader: Reader, recipe: Recipe, stage: Stage, chain: list[bytes], records: tuple[Record, ...], root: str
) -> bytes:
    """What a preview needs of the stage; of a cell's sums the questions alone, since its answers do not add up."""
    labels = np.array([recipe.classes.index(record.label) for record in records], np.int64)
    if recipe.rule == "sums":
        features = _prepared(reader, recipe, records)
        return fits.encode(fits.Questions(root, Grid.of(recipe), features, labels), stage.key)
    logits = _answer(reader, recipe, stage, chain, records)
    return evaluations.encode(evaluations.Evaluation(root, logits, labels), stage.key)


def _answer(reader: Reader, recipe: Recipe, stage: Stage, chain: list[bytes], records: tuple[Record, ...]) -> Logits:
    """The stage's own logits, by the code that serves: those of an assembly with no other member."""
    digests = tuple(sha256_hex(data) for data in chain)
    try:
        for digest, data in zip(digests, chain, strict=True):
            reader.load(digest, data)
        member = Member(stage.key, stage.prefix, digests)
        return reader.build(Assembly(recipe.digest, (member,), recipe.rule)).answer(_prepared(reader, recipe, records))
    finally:
        reader.drop(digests)


@lru_cache(maxsize=1)
def _reader(engine: Trainer, device: str) -> Reader:
    """The serving code over the engine's own backbone weights."""
    return open_reader(engine.recipe, device, engine)


@lru_cache(maxsize=1)
def _prepared(reader: Reader, recipe: Recipe, records: tuple[Record, ...]) -> Any:
    """The evaluation set behind the trunk, which is the same for every stage of a recipe."""
    return reader.prepare(inputs_of(recipe, records))


@lru_cache(maxsize=1)
def read_records(artifacts: Artifacts, _root: str, object_names: tuple[str, ...]) -> tuple[Record, ...]:
    """Records of the evaluation set, which is declared non-deletable, by record id; read once per content."""
    found = [each.record for name in object_names for each in payloads.decode(artifacts.get(name))]
    return tuple(sorted(found, key=lambda record: record.record_id.bytes))
