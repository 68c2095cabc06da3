"""What an operator does to a request, and the papers and records that are about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import LiteralString
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from service.domain.errors import ConflictError, InvalidInputError
from service.domain.requests import Kind, State, check_transition
from service.evidence.events import EventKind
from service.store import events, models, targets
from service.store.database import Connection
from service.store.subjects import Alias

LOCK_FAILED: LiteralString = """
SELECT t.model_id, t.version, t.deactivated_at, r.kind
FROM request_target t JOIN deletion_request r ON r.request_id = t.request_id
WHERE t.request_id = %(request_id)s::uuid AND t.state = 'failed'
ORDER BY t.model_id
FOR UPDATE OF t
"""
MARK_RETRIED: LiteralString = """
UPDATE request_target
SET state = %(state)s::deletion_state, attempts = 0, attempted_at = NULL, error = NULL
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND state = 'failed'
"""
LIST_RECORDS_OF_SUBJECT: LiteralString = """
SELECT s.record_id
FROM subject_alias a
JOIN record_subject s USING (subject_id)
JOIN record r ON r.record_id = s.record_id AND r.dataset_id = %(dataset_id)s::uuid
WHERE a.type = %(type)s::text AND a.digest = ANY(%(digests)s::bytea[])
ORDER BY s.record_id
"""
FIND_MODELS: LiteralString = """
SELECT m.model_id, m.name, d.name AS dataset, d.deletable
FROM model m JOIN dataset d USING (dataset_id)
WHERE m.dataset_id IN (SELECT dataset_id FROM model WHERE name = ANY(%(names)s::text[]))
ORDER BY m.model_id
"""


@dataclass(frozen=True, slots=True)
class _Failed:
    model_id: int
    version: int | None
    deactivated_at: datetime | None
    kind: str

    @property
    def resumes(self) -> State:
        """The last state that the target reached before it failed.

        An erasure's first attempt begins it, so one that failed after `deactivated` may have destroyed something: it
        goes on, and is never one that can still be revoked.
        """
        if self.version is None:
            return State.RECEIVED
        if self.deactivated_at is None:
            return State.DEACTIVATING
        return State.ERASING if self.kind == Kind.ERASE else State.DEACTIVATED


@dataclass(frozen=True, slots=True)
class _Sibling:
    model_id: int
    name: str
    dataset: str
    deletable: bool


def retry(connection: Connection, request_id: UUID, *, actor: str) -> dict[int, State]:
    """Put the failed targets back where they were; the relay moves them on. Their new states by model id.

    Raises:
        NotFoundError: no such request.
        ConflictError: no target has failed.
    """
    with connection.cursor(row_factory=class_row(_Failed)) as cursor:
        failed = cursor.execute(LOCK_FAILED, {"request_id": request_id}).fetchall()
    if not failed:
        raise ConflictError("no target of this request has failed: there is nothing to retry")
    for target in failed:
        state = target.resumes
        check_transition(State.FAILED, state)
        at = {"request_id": request_id, "model_id": target.model_id, "state": state.value}
        connection.execute(MARK_RETRIED, at)
        events.append(
            connection,
            EventKind.TARGET_RETRIED,
            request_id=request_id,
            model_id=target.model_id,
            actor=actor,
            state=state.value,
        )
    targets.refresh_requests(connection, [request_id])
    return {target.model_id: target.resumes for target in failed}


def list_records_of(connection: Connection, dataset_id: UUID, alias: Alias) -> list[UUID]:
    """The records of a dataset that concern a subject; none for an unknown one."""
    values = {"dataset_id": dataset_id, "type": alias.type, "digests": alias.digests}
    with connection.cursor(row_factory=scalar_row) as cursor:
        return cursor.execute(LIST_RECORDS_OF_SUBJECT, values).fetchall()


def get_model_ids(connection: Connection, names: Sequence[str]) -> list[int]:
    """Ids of the models to delete from.

    Raises:
        InvalidInputError: a name is unknown, its dataset is not deletable, or another model is trained on the same
            records and not named: the records leave all of them together.
    """
    with connection.cursor(row_factory=class_row(_Sibling)) as cursor:
        found = cursor.execute(FIND_MODELS, {"names": list(names)}).fetchall()
    if missing := set(names) - {sibling.name for sibling in found}:
        raise InvalidInputError(f"{len(missing)} of the models do not exist; GET /v1/models lists them", field="models")
    for sibling in found:
        if not sibling.deletable:
            raise InvalidInputError(
                f"model {sibling.name} is trained on {sibling.dataset}, which is declared not deletable",
                field="models",
            )
        if sibling.name not in names:
            raise InvalidInputError(
                f"model {sibling.name} is trained on the same records of {sibling.dataset}, which leave both:"
                " name it too, or name no models for all of them",
                field="models",
            )
    return [sibling.model_id for sibling in found]


def list_deletable(connection: Connection, names: Sequence[str] | None) -> list[models.Model]:
    """The models that a request with these names would be about, by id."""
    chosen = None if names is None else set(get_model_ids(connection, names))
    everything = models.list_models(connection)
    if chosen is not None:
        return [model for model in everything if model.model_id in chosen]
    with connection.cursor(row_factory=class_row(_Sibling)) as cursor:
        rows = cursor.execute(FIND_MODELS, {"names": [model.name for model in everything]}).fetchall()
    deletable = {row.model_id for row in rows if row.deletable}
    return [model for model in everything if model.model_id in deletable]
