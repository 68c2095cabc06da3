"""Certificates and their supplements as they are kept: inserted once, never changed; and the ends that are open."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from service.domain.errors import ConflictError, NotFoundError
from service.evidence.certificate import SWEEPS, open_rows
from service.evidence.events import EventKind
from service.evidence.rows import Addition, Evidence
from service.store import events, targets
from service.store.database import Connection

INSERT_CERTIFICATE: LiteralString = """
INSERT INTO certificate (request_id, model_id, envelope, digest, issued_at)
VALUES (%(request_id)s::uuid, %(model_id)s::bigint, %(envelope)s::jsonb, %(digest)s::text, %(issued_at)s::timestamptz)
ON CONFLICT DO NOTHING
RETURNING digest
"""
MARK_COMPLETED: LiteralString = """
UPDATE request_target
SET state = 'completed', outcome = %(outcome)s::deletion_outcome, completed_at = clock_timestamp(), error = NULL
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint
  AND state = CASE %(outcome)s::deletion_outcome WHEN 'erased' THEN 'erasing' ELSE 'deactivated' END::deletion_state
RETURNING request_id
"""
INSERT_OPEN: LiteralString = """
INSERT INTO certificate_open (request_id, model_id, what, name, due_at)
VALUES (%(request_id)s::uuid, %(model_id)s::bigint, %(what)s::text, %(name)s::text, %(due_at)s::timestamptz)
ON CONFLICT DO NOTHING
"""
DELETE_OPEN: LiteralString = """
DELETE FROM certificate_open
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint AND what = %(what)s::text
  AND name = ANY(%(names)s::text[])
"""
CLOSE: LiteralString = """
DELETE FROM certificate_open WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint
"""
INSERT_SUPPLEMENT: LiteralString = """
INSERT INTO certificate_supplement (request_id, model_id, number, envelope, digest, issued_at)
VALUES (%(request_id)s::uuid, %(model_id)s::bigint, %(number)s::int, %(envelope)s::jsonb, %(digest)s::text,
        %(issued_at)s::timestamptz)
ON CONFLICT DO NOTHING
RETURNING number
"""
LIST_CERTIFICATES: LiteralString = """
SELECT c.model_id, m.name AS model, c.envelope, c.digest, c.issued_at
FROM certificate c JOIN model m USING (model_id)
WHERE c.request_id = %(request_id)s::uuid AND (%(model)s::text IS NULL OR m.name = %(model)s::text)
ORDER BY c.model_id
"""
LIST_SUPPLEMENTS: LiteralString = """
SELECT number, envelope, digest, issued_at FROM certificate_supplement
WHERE request_id = %(request_id)s::uuid AND model_id = %(model_id)s::bigint
ORDER BY number
"""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A signed certificate, as stored."""

    model_id: int
    model: str
    envelope: dict[str, Any]
    digest: str
    """SHA-256 of the envelope's canonical JSON."""
    issued_at: datetime


@dataclass(frozen=True, slots=True)
class Supplement:
    """A signed supplement, as stored."""

    number: int
    envelope: dict[str, Any]
    digest: str
    issued_at: datetime


def list_certificates(connection: Connection, request_id: UUID, model: str | None = None) -> list[Certificate]:
    """The certificates of a request, of one model or of all."""
    with connection.cursor(row_factory=class_row(Certificate)) as cursor:
        return cursor.execute(LIST_CERTIFICATES, {"request_id": request_id, "model": model}).fetchall()


def get_certificate(connection: Connection, request_id: UUID, model: str | None) -> Certificate:
    """The certificate of a request's target.

    Raises:
        NotFoundError: there is none yet.
        ConflictError: there are several and `model` does not say which.
    """
    found = list_certificates(connection, request_id, model)
    if not found:
        raise NotFoundError("there is no certificate yet: one is issued per model when its target completes")
    if len(found) > 1:
        names = ", ".join(certificate.model for certificate in found)
        raise ConflictError(f"there is one certificate per model ({names}): say which with ?model=")
    return found[0]


def list_supplements(connection: Connection, request_id: UUID, model_id: int) -> list[Supplement]:
    """The supplements of a certificate in their order."""
    with connection.cursor(row_factory=class_row(Supplement)) as cursor:
        return cursor.execute(LIST_SUPPLEMENTS, {"request_id": request_id, "model_id": model_id}).fetchall()


def insert_certificate(
    connection: Connection, evidence: Evidence, model_id: int, envelope: dict[str, Any], digest: str
) -> bool:
    """Store the certificate and complete its target; False when another worker has done it, or it was withdrawn."""
    values: dict[str, Any] = {"request_id": evidence.request_id, "model_id": model_id}
    if connection.execute(MARK_COMPLETED, {**values, "outcome": evidence.outcome}).fetchone() is None:
        return False
    stored = {**values, "envelope": Jsonb(envelope), "digest": digest, "issued_at": evidence.issued_at}
    if connection.execute(INSERT_CERTIFICATE, stored).fetchone() is not None:
        for what, name, due_at in _open_ends(evidence):
            connection.execute(INSERT_OPEN, {**values, "what": what, "name": name, "due_at": due_at})
    targets.refresh_requests(connection, [evidence.request_id])
    events.append(connection, EventKind.CERTIFICATE_ISSUED, digest=digest, **values)
    events.append(connection, EventKind.TARGET_COMPLETED, outcome=evidence.outcome, **values)
    return True


def _open_ends(evidence: Evidence) -> Iterable[tuple[str, str, datetime]]:
    """What a supplement is due for, and not before when."""
    if evidence.outcome == "erased":
        for number, after in enumerate(SWEEPS, 1):
            yield "sweep", str(number), evidence.issued_at + after
    else:
        yield "lift", "", evidence.issued_at
    for row in open_rows(evidence):
        if row.code == "memory_release_not_confirmed":
            yield "process", row.name, evidence.issued_at
        elif row.code == "export_not_withdrawn":
            yield "export", row.name, evidence.issued_at
    if evidence.version_after > 0:
        yield "rebuild", "", evidence.issued_at


def insert_supplement(
    connection: Connection, addition: Addition, model_id: int, envelope: dict[str, Any], digest: str
) -> bool:
    """Store the supplement and close what it answers; False when another program was faster."""
    values: dict[str, Any] = {"request_id": addition.request_id, "model_id": model_id}
    stored = {
        **values,
        "number": addition.number,
        "envelope": Jsonb(envelope),
        "digest": digest,
        "issued_at": addition.issued_at,
    }
    if connection.execute(INSERT_SUPPLEMENT, stored).fetchone() is None:
        return False
    answered = {
        "sweep": [str(row.sweep) for row in addition.sweeps],
        "process": [str(row.process_id) for row in addition.processes],
        "export": [name for name, _ in addition.exports],
        "rebuild": [""] if addition.rebuild else [],
    }
    for what, names in answered.items():
        if names:
            connection.execute(DELETE_OPEN, {**values, "what": what, "names": names})
    if addition.lifted:
        connection.execute(CLOSE, values)
    events.append(
        connection,
        EventKind.CERTIFICATE_SUPPLEMENTED,
        certificate=addition.certificate,
        number=addition.number,
        digest=digest,
        **values,
    )
    return True
