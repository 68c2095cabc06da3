"""Training of queued stages: claim under a token, train, publish only what is still clean (protocol.md section 4)."""

import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from uuid import UUID, uuid4

import structlog

from service.evidence.events import EventKind
from service.store import cells, events, jobs, lineage, models, objects, payloads, quarantine, records, stages
from service.store.artifacts import ArtifactMissingError
from service.store.database import Connection, connect, retrying, transaction
from service.store.jobs import Job
from service.store.models import Model
from shards.digest import digest_of, sha256_hex
from shards.engine.artifacts import decode_verified
from shards.engine.determinism import prepare
from shards.engine.interface import Trainer, check_lineage
from shards.engine.registry import open_trainer
from shards.engine.replay import platform_of
from shards.engine.scratch import reap
from shards.errors import ArtifactDigestError
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage
from workers import evaluation, repetition, verdicts
from workers.context import Context
from workers.failures import told

log = structlog.get_logger()

BEAT_SECONDS = 2.0
FORGET_SECONDS = 30.0
"""How often a long job looks for features of records that were deleted meanwhile."""


class CancelledError(Exception):
    """The job was cancelled or given to another worker while it ran."""


class RefusedError(Exception):
    """The stage may not be published; the reason is the message."""


def train_queued(context: Context) -> int:
    """Train jobs until none can be taken; returns how many stages were published.

    A child of the stage just trained is preferred: its features are in this process's memory. They and the weights
    leave it at the end, and when another model's turn comes.
    """
    trained, after = 0, None
    engine: Trainer | None = None
    reap()
    try:
        while True:
            with transaction(context.pool) as connection:
                job = jobs.claim_job(connection, after=after)
            if job is None:
                return trained
            before = engine
            engine, published = _attempt(context, job)
            if before is not None and before is not engine:
                _forget(before)
            trained += published
            after = job.stage_key if published else None
            context.bell.ring("stages.train")  # a sibling may have become free for another worker
            _publish_when_last(context, job.model_id)
    finally:
        if engine is not None:
            _forget(engine)


def _forget(engine: Trainer) -> None:
    """Nothing of a stage or a record outlives its erasure in an idle trainer's memory."""
    engine.clear()
    evaluation.forget()


def _publish_when_last(context: Context, model_id: int) -> None:
    with transaction(context.pool) as connection:
        last = jobs.count_open(connection, model_id) == 0
    if last:
        context.bell.ring("model.publish", model_id)


def _attempt(context: Context, job: Job) -> tuple[Trainer | None, bool]:
    """One attempt at a job; whatever goes wrong is on the job's row, and the worker lives on."""
    engine: Trainer | None = None
    error = ""
    try:
        with transaction(context.pool) as connection:
            model = models.get_model_by_id(connection, job.model_id)
        commands = tuple((name, tuple(argv)) for name, argv in context.settings.commands.items())
        engine = _engine(model.recipe_digest, context.settings.device, model.parsed_recipe, commands)
        _forget_deleted(context, engine, keep=set())
        _train(context, engine, model, job)
    except CancelledError:
        log.info("stage.cancelled", stage=job.stage_key)
        if engine is not None:
            engine.clear()
        return engine, False
    except RefusedError as refusal:
        error = str(refusal)
    except Exception as failure:  # noqa: BLE001 - a job must never take its worker with it
        error = told(failure, at_hand=engine is not None)
        log.warning("stage.attempt_failed", stage=job.stage_key, error=error)
    if error:
        if engine is not None:
            engine.clear()  # before Postgres is asked, which may be what is away
        _mark_tried(context, job, error)
    return engine, not error


def _mark_tried(context: Context, job: Job, error: str) -> None:
    with transaction(context.pool) as connection:
        tried = jobs.mark_tried(connection, job, error, limit=context.settings.job_attempts)
        if tried is not None and tried.state == "failed":
            events.append(
                connection,
                EventKind.STAGE_FAILED,
                model_id=job.model_id,
                stage=job.stage_key,
                error=error,
                attempts=tried.attempts,
            )


@lru_cache(maxsize=1)
def _engine(
    _recipe_digest: str, device: str, recipe: Recipe, commands: tuple[tuple[str, tuple[str, ...]], ...]
) -> Trainer:
    """The engine of one recipe, kept while this worker trains it."""
    prepare()
    return open_trainer(recipe, device, dict(commands))


def _train(context: Context, engine: Trainer, model: Model, job: Job) -> None:
    with _Beat(context, job) as alive:
        stage, rows, parents = _inputs(context, model, job)

        looked, own = time.monotonic(), {record.record_id for record in rows}

        def progress(_done: int, _total: int) -> None:
            nonlocal looked
            if not alive():
                raise CancelledError
            if time.monotonic() - looked > FORGET_SECONDS:
                looked = time.monotonic()
                _forget_deleted(context, engine, keep=own)

        data = engine.train(stage, rows, parents, progress)
        name = f"stages/{stage.key}/{sha256_hex(data)}/{uuid4()}.safetensors"
        platform = platform_of(engine, context.settings.device)
        if repetition.untried(model):
            repetition.compare(context, model, stage, data, engine.train(stage, rows, parents, progress), platform)
        parent = sha256_hex(parents[-1]) if parents else None
        _write(context, job, name, data, kind="stage", parent=parent, platform=platform)
        names = [name, *evaluation.write(context, engine, model, job, stage, [*parents, data], platform)]
        _publish(context, model, job, stage, sha256_hex(data), names, platform)


def _forget_deleted(context: Context, engine: Trainer, *, keep: set[UUID]) -> None:
    """Drop features of records that were deleted; those to `keep` are in use, and cancel their job if deleted."""
    held = [record_id for record_id in engine.record_ids if record_id not in keep]
    with transaction(context.pool) as connection:
        engine.forget(records.list_tombstoned(connection, held))


def _inputs(context: Context, model: Model, job: Job) -> tuple[Stage, list[Record], list[bytes]]:
    """The stage, exactly the records of its manifests, and its ancestors' verified artefacts."""
    with transaction(context.pool) as connection:
        stage = stages.list_by_key(connection, [job.stage_key], model.recipe_digest)[job.stage_key]
        open_stages = stages.list_open(connection, model.model_id, model.recipe_digest)
        reads = lineage.list_reads(connection, job.stage_key)
        active = {read.slice: cells.list_active(connection, read.cell_id, read.generation) for read in reads}
    by_slice: Mapping[int, list[Record]] = {
        read.slice: [
            stored.record
            for stored in (payloads.decode(context.artifacts.get(read.object_name)) if read.object_name else [])
            if stored.record.record_id in active[read.slice]
        ]
        for read in reads
    }
    parents: list[bytes] = []
    key = stage.parent
    while key is not None:
        digest = open_stages.digests.get(key)
        if digest is None:
            raise RefusedError("ParentGone")
        data = _verified(context, model.model_id, open_stages.objects[digest], digest)
        parents.insert(0, data)
        key = open_stages.stages[key].parent
    return stage, check_lineage(stage, by_slice), parents


def _verified(context: Context, model_id: int, object_name: str, digest: str) -> bytes:
    """An ancestor's artefact; one that is gone or damaged is lost and has to be trained again (rule 20)."""
    try:
        data = context.artifacts.get(object_name)
        decode_verified(data, digest)
    except (ArtifactMissingError, ArtifactDigestError):
        with transaction(context.pool) as connection:
            models.mark_rebuild_wanted(connection, model_id)
            objects.mark_lost(connection, objects.Object(object_name, digest, None, None))
        raise
    return data


def _write(
    context: Context,
    job: Job,
    name: str,
    data: bytes,
    *,
    kind: str,
    parent: str | None,
    platform: dict[str, str],
) -> None:
    """The intent row first, under the job's token, so that no name appears after a cancellation (rules 20 and 22)."""
    with transaction(context.pool) as connection:
        if not jobs.lock_claimed(connection, job):
            raise CancelledError
        objects.insert_platform(connection, digest_of(platform), platform)
        objects.insert_writing(
            connection,
            name,
            kind=kind,
            stage_key=job.stage_key,
            digest=sha256_hex(data),
            size=len(data),
            fingerprint=digest_of(platform),
            parent_digest=parent,
        )
    context.artifacts.put(name, data)


def _publish(
    context: Context,
    model: Model,
    job: Job,
    stage: Stage,
    digest: str,
    names: list[str],
    platform: dict[str, str],
) -> None:
    """One transaction: token, lineage, own rows and digest are looked at again, then the stage is live (rule 21)."""

    def step() -> str | None:
        with transaction(context.pool) as connection:
            models.share_model(connection, model.model_id)
            reads = lineage.list_reads(connection, stage.key)
            cells.share_cells(connection, [read.cell_id for read in reads])
            if not jobs.lock_claimed(connection, job):
                reason = "TokenGone"
            elif stages.list_touched(connection, [stage.key]):
                reason = "Tainted"
            else:
                return _make_live(connection, model, job, digest, names, digest_of(platform))
            return _refuse(connection, model, job, names, reason)

    reason = retrying(step)
    if reason == "DigestMismatch":
        log.error("stage.digest_mismatch", stage=stage.key, digest=digest)
    if reason is not None:
        raise CancelledError if reason == "TokenGone" else RefusedError(reason)


def _make_live(
    connection: Connection, model: Model, job: Job, digest: str, names: list[str], platform: str
) -> str | None:
    refuted = quarantine.list_digests(connection, model.model_id, job.stage_key, platform)
    if digest in refuted or len(refuted) > 1:
        return _refuse(connection, model, job, names, "Quarantined")
    objects.doom_orphans(connection, names[0], model_id=model.model_id)
    made = objects.list_made(connection, names[0])
    if others := sorted({each.digest for each in made} - {digest}):
        if model.parsed_recipe.engine != "external":
            verdicts.contradict(
                connection,
                model.model_id,
                job.stage_key,
                served=others,
                digest=digest,
                written=names,
                platform=platform,
            )
            return _refuse(connection, model, job, [], "DigestMismatch")
        repetition.note(connection, model, job.stage_key, [digest, *others], platform)  # the command's nature
    live = any(each.live for each in made)
    if live or not objects.mark_live(connection, names):
        return _refuse(connection, model, job, names, "AlreadyLive" if live else "Doomed")
    jobs.mark_done(connection, job, platform)
    events.append(
        connection,
        EventKind.STAGE_TRAINED,
        model_id=model.model_id,
        stage=job.stage_key,
        digest=digest,
        fingerprint=platform,
    )
    return None


def _refuse(connection: Connection, model: Model, job: Job, names: list[str], reason: str) -> str:
    objects.doom(connection, names, model_id=model.model_id)
    events.append(connection, EventKind.STAGE_REFUSED, model_id=model.model_id, stage=job.stage_key, reason=reason)
    return reason


class _Beat:
    """Says every two seconds, from its own thread and connection, that a job is alive."""

    def __init__(self, context: Context, job: Job) -> None:
        self._context = context
        self._job = job
        self._stop = threading.Event()
        self._gone = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def __enter__(self) -> Callable[[], bool]:
        self._thread.start()
        return lambda: not self._gone.is_set()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        connection: Connection | None = None
        while not self._stop.wait(BEAT_SECONDS):
            try:
                connection = connection or connect(self._context.settings.database_url, autocommit=True)
                if not jobs.beat(connection, self._job):
                    self._gone.set()
                    break
            except Exception as error:  # noqa: BLE001 - a lost beat is the reaper's business, not the training's
                log.warning("stage.beat_failed", error=type(error).__name__)
                connection = None
        if connection is not None:
            connection.close()
