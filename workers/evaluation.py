"""Evaluation of a stage when it is published: its logits on the model's evaluation set, kept as an artefact.

They are derived from training data, so they are doomed and destroyed with their stage. A preview adds them up exactly
as the ensemble would.
"""

from functools import lru_cache
from uuid import uuid4

import numpy as np

from service.store import cells, evaluations, jobs, objects, payloads
from service.store.artifacts import LocalArtifacts
from service.store.database import transaction
from service.store.jobs import Job
from service.store.models import Model
from shards.assembly import Member
from shards.digest import digest_of, sha256_hex
from shards.engine.ensemble import StageTensors
from shards.engine.s3t import S3T
from shards.engine.skeleton import Prepared, Skeleton
from shards.manifest import Record
from shards.stages import Stage
from workers.context import Context


def write(
    context: Context,
    engine: S3T,
    model: Model,
    job: Job,
    stage: Stage,
    chain: list[bytes],
    platform: dict[str, str],
) -> list[str]:
    """Evaluate the newest stage of `chain`; the new object's name, or nothing without an evaluation set."""
    if model.evaluation_id is None:
        return []
    with transaction(context.pool) as connection:
        root = evaluations.evaluation_root(connection, model.evaluation_id)
        found = cells.list_cells(connection, model.evaluation_id)
    records = _records(context.artifacts, root, tuple(cell.object_name for cell in found if cell.object_name))
    if not records:
        return []
    tensors = StageTensors(engine.recipe, device=context.settings.device)
    digests = tuple(sha256_hex(data) for data in chain)
    for digest, data in zip(digests, chain, strict=True):
        tensors.add(digest, data)
    line = Member(stage.key, stage.prefix, digests)
    skeleton = _skeleton(engine, context.settings.device)
    (logits,) = skeleton.answer([tensors.member(line)], _prepared(skeleton, records))
    classes = engine.recipe.classes
    labels = np.array([classes.index(record.label) for record in records], np.int64)
    data = evaluations.encode(evaluations.Evaluation(root, logits, labels))
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
    _skeleton.cache_clear()
    _prepared.cache_clear()


@lru_cache(maxsize=1)
def _skeleton(engine: S3T, device: str) -> Skeleton:
    """The serving code over the engine's own backbone weights."""
    return Skeleton(engine.recipe, engine.backbone, device=device)


@lru_cache(maxsize=1)
def _prepared(skeleton: Skeleton, records: tuple[Record, ...]) -> Prepared:
    """The evaluation set behind the trunk, which is the same for every stage of a recipe."""
    return skeleton.prepare([record.text for record in records])


@lru_cache(maxsize=1)
def _records(artifacts: LocalArtifacts, _root: str, object_names: tuple[str, ...]) -> tuple[Record, ...]:
    """Records of the evaluation set, which is declared non-deletable, by record id; read once per content."""
    found = [each.record for name in object_names for each in payloads.decode(artifacts.get(name))]
    return tuple(sorted(found, key=lambda record: record.record_id.bytes))
