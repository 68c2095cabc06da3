"""The last step: a signed certificate from committed rows, stored in the transaction that completes the target."""

from uuid import UUID

import structlog

from service.evidence.certificate import digest_of_envelope, issue
from service.evidence.events import EventKind
from service.evidence.keys import load_signing_key, public_pem
from service.evidence.signers import prove
from service.evidence.tiles import CHECKPOINT
from service.evidence.verify import verify
from service.store import certificates, events, evidence, objects, targets, told
from service.store.database import get_time, retrying, transaction
from service.store.ledger_files import LedgerFiles
from workers.context import Context

log = structlog.get_logger()


class UnverifiedError(Exception):
    """What was gathered does not make a statement that `expunge verify` accepts; nothing was stored."""


def certify_target(context: Context, request_id: UUID, model_id: int) -> bool:
    """Issue the certificate of an erased or restricted target; False when it is not this target's turn.

    It waits until the target's events are in the published ledger, tiles and all (rule 17), and while the signing key
    does not answer; the relay rings again.
    Signed twice after a crash, stored once: the row is unique, and its payload comes from committed rows only.
    """
    checkpoint = published(context)
    if checkpoint is None:
        return False
    key = load_signing_key(context.settings.keys_dir / "signing.pem")
    prove(key)  # ahead of the count: a key that does not answer uses up no attempt
    if not _begin(context, request_id, model_id, checkpoint):
        return False
    if not _look_again(context, request_id, model_id):
        return False
    with transaction(context.pool) as connection:
        found = evidence.get_evidence(
            connection,
            request_id,
            model_id,
            checkpoint=checkpoint,
            key_backup_days=context.settings.file_key_backup_days,
        )
    if found is None:
        return False
    envelope = issue(found, key)
    if refused := [f"{check.name} ({check.detail})" for check in verify(envelope, public_pem(key)) if not check.passed]:
        raise UnverifiedError(f"the certificate would not verify: {', '.join(refused)}")
    digest = digest_of_envelope(envelope)

    def step() -> bool:
        with transaction(context.pool) as connection:
            return certificates.insert_certificate(connection, found, model_id, envelope, digest)

    return retrying(step)


def _begin(context: Context, request_id: UUID, model_id: int, checkpoint: str) -> bool:
    """Count an attempt before the work, where it is the target's turn."""
    with transaction(context.pool) as connection:
        state = evidence.find_state(connection, request_id, model_id)
        if state is None or not told.is_published(connection, request_id, model_id, checkpoint):
            return False
        attempts = targets.raise_attempts(connection, request_id, model_id, state)
        if attempts is not None and attempts > context.settings.target_attempts:
            targets.mark_failed(connection, request_id, model_id, state, "AttemptsExhausted")
            return False
    return attempts is not None


def published(context: Context) -> str | None:
    """The newest tree head whose tiles are in the artefact store; None before the first."""
    found = LedgerFiles(context.artifacts).read(CHECKPOINT)
    return None if found is None else found.decode()


def _look_again(context: Context, request_id: UUID, model_id: int) -> bool:
    """Look a second time for every destroyed object. What a paused writer has brought back is destroyed again: False.

    The next attempt looks for all of them again.
    """
    with transaction(context.pool) as connection:
        names = evidence.list_objects(connection, request_id, model_id)
        looked_at = get_time(connection)  # before the look: nothing is deleted in between but what is found
    again = [name for name in names if context.artifacts.exists(name)]
    for name in again:
        log.warning("artifact.reappeared", object_name=name)
        context.artifacts.delete(name)
    with transaction(context.pool) as connection:
        for name in again:
            events.append(connection, EventKind.ARTIFACT_REAPPEARED, object_name=name, digest=None)
        if not again:
            objects.mark_absent(connection, names, looked_at)
    return not again
