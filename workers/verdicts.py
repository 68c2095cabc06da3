"""What follows from a replay: one transaction that ends it, and takes a stage that differs out of service."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from service.domain.replays import ReplayOutcome
from service.evidence.events import EventKind
from service.store import events, jobs, models, objects, publish, quarantine, replays, served
from service.store.database import Connection, retrying, transaction
from service.store.models import Model
from service.store.quarantine import Quarantined
from service.store.replays import Claim
from shards.digest import digest_of
from workers import repetition
from workers.context import Context

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What training a served stage's chain again gave."""

    outcome: ReplayOutcome
    platform: dict[str, str] = field(default_factory=dict[str, str])
    """On which it was trained; empty where it was skipped."""
    found: str | None = None
    """Digest that training from nothing gave: of the drawn stage, or of `stage`."""
    stage: str = ""
    """On a mismatch the first stage of the chain that differs."""
    expected: str | None = None
    """Digest of that stage's served artefact."""
    differs: tuple[str, ...] = ()
    """Fields in which the artefact's platform is another."""
    reason: str | None = None
    """Why it was skipped."""


def end_replay(context: Context, claim: Claim, verdict: Verdict) -> bool:
    """Write the verdict down and act on it; False where the replay has ended or is another's."""

    def step() -> bool:
        with transaction(context.pool) as connection:
            return _end(connection, claim, verdict)

    ended = retrying(step)
    if ended and verdict.outcome is ReplayOutcome.MISMATCH:
        log.error("stage.replay_mismatch", stage=verdict.stage, digest=verdict.expected, replayed=verdict.found)
    elif ended:
        log.info("stage.replayed", stage=claim.stage_key, outcome=verdict.outcome.value)
    return ended


def _end(connection: Connection, claim: Claim, verdict: Verdict) -> bool:
    model = models.lock_model(connection, claim.model_id)
    platform = None
    if verdict.platform:
        platform = digest_of(verdict.platform)
        objects.insert_platform(connection, platform, verdict.platform)
        served.mark_seen(connection, claim.stage_key, platform)
    if not replays.mark_ended(
        connection,
        claim,
        verdict.outcome,
        found=verdict.found,
        differs_at=verdict.stage or None,
        platform=platform,
        reason=verdict.reason,
    ):
        return False
    about: dict[str, Any] = {"model_id": claim.model_id, "stage": claim.stage_key, "digest": claim.digest}
    match verdict.outcome:
        case ReplayOutcome.EQUAL:
            events.append(connection, EventKind.STAGE_REPLAY_EQUAL, fingerprint=claim.fingerprint, **about)
        case ReplayOutcome.OTHER_PLATFORM:
            events.append(
                connection,
                EventKind.STAGE_REPLAY_OTHER_PLATFORM,
                fingerprint=claim.fingerprint,
                platform=platform,
                differs=list(verdict.differs),
                **about,
            )
        case ReplayOutcome.MISMATCH:
            _take_out(connection, claim, verdict, platform)
            if model.parsed_recipe.engine == "external":  # of our own engines a difference is damage, not their nature
                digests = [verdict.expected or "", verdict.found or ""]
                repetition.note(connection, model, verdict.stage, digests, platform or "")
        case ReplayOutcome.SKIPPED:
            events.append(connection, EventKind.STAGE_REPLAY_SKIPPED, reason=verdict.reason, **about)
        case ReplayOutcome.FAILED:
            events.append(connection, EventKind.STAGE_REPLAY_FAILED, error=verdict.reason, **about)
    return True


def _take_out(connection: Connection, claim: Claim, verdict: Verdict, platform: str | None) -> None:
    """Retrain-equal is broken here: the stage and all that was trained on it leave service, and stay as evidence."""
    model = models.get_model_by_id(connection, claim.model_id)
    _cancel(connection, model, quarantine.list_below(connection, verdict.stage))
    out = quarantine.quarantine(connection, model.model_id, verdict.stage, verdict.expected or "")
    events.append(
        connection,
        EventKind.STAGE_REPLAY_MISMATCH,
        model_id=model.model_id,
        stage=verdict.stage,
        digest=verdict.expected,
        replayed=verdict.found,
        fingerprint=platform,
        artifacts=[each.object_name for each in out],
    )
    _replace(connection, model, out)


def contradict(
    connection: Connection,
    model_id: int,
    stage_key: str,
    *,
    served: Sequence[str],
    digest: str,
    written: Sequence[str],
    platform: str,
) -> None:
    """Two digests of one stage from one platform, found by training it anew: both leave service, and stay as evidence.

    `served` are the ones from before, `digest` is the one of the files just `written`. The job of the stage itself is
    the caller's. A deadlock with another that shares the model's lock is possible: run the transaction again.
    """
    model = models.lock_model(connection, model_id)
    _cancel(connection, model, [key for key in quarantine.list_below(connection, stage_key) if key != stage_key])
    events.append(
        connection,
        EventKind.STAGE_MISMATCH,
        model_id=model_id,
        stage=stage_key,
        digests=sorted({digest, *served}),
        fingerprint=platform,
    )
    quarantine.keep(connection, model_id, written)
    out: list[Quarantined] = []
    for each in served:
        out += quarantine.quarantine(connection, model_id, stage_key, each)
        replays.insert_contradicted(connection, model_id, stage_key, digest=each, found=digest, fingerprint=platform)
    _replace(connection, model, out)


def _cancel(connection: Connection, model: Model, stage_keys: Sequence[str]) -> None:
    for key in jobs.cancel(connection, stage_keys):
        events.append(connection, EventKind.STAGE_CANCELLED, model_id=model.model_id, stage=key)


def _replace(connection: Connection, model: Model, out: Sequence[Quarantined]) -> None:
    if out and model.version > 0:
        # Also where the assembly stays the same: replicas may hold the stage in reserve, or an older version serve it.
        publish.publish(connection, model, publish.candidate(connection, model), cause="deactivate")
    if out:
        models.mark_rebuild_wanted(connection, model.model_id)
