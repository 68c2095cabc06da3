"""Challenge audits: what an auditor asked for, the stages drawn, and where the ledger says what of them."""

import base64
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString
from uuid import UUID, uuid4

from psycopg.rows import class_row, dict_row, scalar_row
from psycopg.types.json import Jsonb

from service.domain.errors import ConflictError, NotFoundError
from service.domain.replays import ReplayOutcome
from service.evidence import challenge, note
from service.evidence.challenge import OUTCOMES
from service.evidence.events import EventKind
from service.evidence.tree_head import TreeHead, read_head, write_proof
from service.store import events, ledger, models
from service.store.database import Connection
from service.store.ledger import Entry, SignedHead
from service.store.models import Model
from service.store.served import list_served
from shards.assembly import Assembly
from shards.digest import sha256_hex

FIND_OPEN: LiteralString = """
SELECT r.challenge_id FROM replay r
WHERE r.model_id = %(model_id)s::bigint AND r.challenge_id IS NOT NULL AND r.outcome IS NULL
LIMIT 1
"""
GET_TREE_HEAD: LiteralString = "SELECT size, root, note FROM tree_head WHERE size = %(size)s::bigint"
GET_ASSEMBLY: LiteralString = """
SELECT a.body FROM model_version v JOIN assembly a ON a.digest = v.assembly
WHERE v.model_id = %(model_id)s::bigint AND v.version = %(version)s::bigint
"""
INSERT: LiteralString = """
INSERT INTO challenge (challenge_id, model_id, version, checkpoint, witness, stages)
VALUES (%(challenge_id)s::uuid, %(model_id)s::bigint, %(version)s::bigint, %(checkpoint)s::text, %(witness)s::text,
        %(stages)s::int)
"""
INSERT_REPLAY: LiteralString = """
INSERT INTO replay (model_id, stage_key, digest, fingerprint, made_by, drawn_on, challenge_id)
VALUES (%(model_id)s::bigint, %(stage_key)s::text, %(digest)s::text, %(fingerprint)s::text, %(made_by)s::text,
        current_date, %(challenge_id)s::uuid)
"""
GET: LiteralString = """
SELECT challenge_id, version, checkpoint, witness, stages, created_at FROM challenge
WHERE model_id = %(model_id)s::bigint AND challenge_id = %(challenge_id)s::uuid
"""
LIST: LiteralString = """
SELECT c.challenge_id, c.version, c.stages AS asked, c.created_at,
       count(r.replay_id) AS drawn, count(r.outcome) AS ended,
       count(*) FILTER (WHERE r.outcome = 'equal') AS equal
FROM challenge c LEFT JOIN replay r ON r.challenge_id = c.challenge_id
WHERE c.model_id = %(model_id)s::bigint
GROUP BY c.challenge_id
ORDER BY c.created_at DESC, c.challenge_id
LIMIT 100
"""
LIST_DRAWN: LiteralString = """
SELECT stage_key, digest, outcome, differs_at FROM replay
WHERE challenge_id = %(challenge_id)s::uuid ORDER BY replay_id
"""
# The first event of the kind with these fields, among the leaves from `first` to before `stop`.
FIND_ENTRY: LiteralString = """
SELECT l.index, l.leaf, o.opening
FROM event_pending e
JOIN ledger_leaf l ON l.event_id = e.event_id
JOIN ledger_opening o ON o.index = l.index
WHERE e.model_id = %(model_id)s::bigint AND e.kind = %(kind)s::text AND e.id IN (  -- each as its index says it
    SELECT id FROM event_pending
    WHERE kind = 'version.published' AND model_id = %(model_id)s::bigint
      AND (body ->> 'version')::bigint = (%(body)s::jsonb ->> 'version')::bigint
    UNION ALL
    SELECT id FROM event_pending WHERE kind LIKE 'stage.%%' AND body @> %(body)s::jsonb)
  AND l.index >= %(first)s::bigint AND l.index < %(stop)s::bigint
ORDER BY l.index
LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What was asked for."""

    challenge_id: UUID
    version: int
    checkpoint: str
    witness: str
    stages: int
    created_at: datetime

    @property
    def head(self) -> TreeHead:
        """The tree head that the witness cosigned."""
        return read_head(self.checkpoint)


@dataclass(frozen=True, slots=True)
class _Drawn:
    stage_key: str
    digest: str
    outcome: str | None
    differs_at: str | None


def open_challenge(connection: Connection, name: str, *, checkpoint: str, witness: str, count: int, actor: str) -> UUID:
    """Draw stages of what the model serves by the witness's cosignature, and have them replayed.

    Raises:
        NotFoundError: no such model.
        ConflictError: nothing is served, another challenge is open, or the tree head is not one that tells of all
            that could be drawn.
        ValueError: not a checkpoint, or not cosigned under that key.
    """
    model = models.get_model(connection, name)
    witness_name, key = note.read_vkey(witness, note.COSIGNATURE)
    cosigned = note.parse(checkpoint)
    cosignature = note.get_cosignature(cosigned, witness_name, key)
    signed = _own(connection, read_head(checkpoint))
    assembly = _assembly(connection, model, model.version)
    speaking = challenge.speaking(assembly)
    _require_logged(connection, model, signed.size, {key: each.artifacts[-1] for key, each in speaking.items()})
    drawn = challenge.draw_stages(list(speaking), count, cosignature)
    made = {each.stage_key: each for each in list_served(connection, model.model_id) if each.leaf == each.stage_key}
    if gone := [key for key in drawn if key not in made]:
        raise ConflictError(f"the file of stage {gone[0][:12]} is lost and not trained again yet: try again then")
    # Only now, and to the end: what was looked up took its time, and deletions publish under this lock.
    if models.lock_model(connection, model.model_id).version != model.version:
        raise ConflictError("another version was published meanwhile: have the witness cosign the newest tree head")
    if connection.execute(FIND_OPEN, {"model_id": model.model_id}).fetchone() is not None:
        raise ConflictError("another challenge of the model is open: wait until its stages are replayed")
    challenge_id = uuid4()
    only = note.Note(cosigned.text, note.parse(signed.note).signatures + _of(cosigned, witness_name, cosignature))
    values = {"challenge_id": challenge_id, "model_id": model.model_id}
    connection.execute(
        INSERT,
        {**values, "version": model.version, "checkpoint": str(only), "witness": witness, "stages": count},
    )
    for key in drawn:
        found = made[key]
        about = {"digest": found.digest, "fingerprint": found.fingerprint, "made_by": found.host}
        connection.execute(INSERT_REPLAY, {**values, "stage_key": key, **about})
    events.append(
        connection,
        EventKind.CHALLENGE_OPENED,
        model_id=model.model_id,
        challenge_id=str(challenge_id),
        version=model.version,
        size=signed.size,
        witness=sha256_hex(witness.encode()),
        stages=drawn,
        actor=actor,
    )
    return challenge_id


def list_challenges(connection: Connection, model_id: int) -> list[dict[str, Any]]:
    """The newest first, with how many stages were drawn, have ended, and were equal."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(LIST, {"model_id": model_id}).fetchall()


def document(connection: Connection, name: str, challenge_id: UUID) -> dict[str, Any]:
    """All that an auditor needs to check a challenge without us (`service.evidence.challenge.check`).

    Raises:
        NotFoundError: no such challenge, or openings that it needs were erased with their age.
    """
    model = models.get_model(connection, name)
    with connection.cursor(row_factory=class_row(Challenge)) as cursor:
        values = {"model_id": model.model_id, "challenge_id": challenge_id}
        found = cursor.execute(GET, values).fetchone()
    if found is None:
        raise NotFoundError("the model has no such challenge; GET its /challenges lists them")
    with connection.cursor(row_factory=class_row(_Drawn)) as cursor:
        drawn = cursor.execute(LIST_DRAWN, {"challenge_id": challenge_id}).fetchall()
    old = _own(connection, found.head)
    newest = ledger.find_tree_head(connection) or old
    log = _Log(connection, model.model_id, SignedHead(old.size, old.root, found.checkpoint), newest)
    return {
        "type": challenge.TYPE,
        "challenge_id": str(challenge_id),
        "model": name,
        "model_id": model.model_id,
        "asked": found.stages,
        "checkpoint": found.checkpoint,
        "assembly": _assembly(connection, model, found.version).to_json(),
        "published": log.before(EventKind.VERSION_PUBLISHED, {"version": found.version}),
        "drawn": [
            {
                "stage": each.stage_key,
                "queued": log.before(EventKind.STAGE_QUEUED, {"stages": [each.stage_key]}),
                "trained": log.before(EventKind.STAGE_TRAINED, {"stage": each.stage_key, "digest": each.digest}),
                "outcome": log.after(each),
            }
            for each in drawn
        ],
        "newest": newest.note,
        "consistency": [_base64(each) for each in ledger.tree(connection, newest.size).consistency(old.size)],
    }


class _Log:
    """Leaves with their proofs: of what was logged before the draw, and of what came of it."""

    def __init__(self, connection: Connection, model_id: int, old: SignedHead, newest: SignedHead) -> None:
        self._connection, self._model_id = connection, model_id
        self._old, self._newest = old, newest

    def before(self, kind: EventKind, body: dict[str, Any]) -> dict[str, Any]:
        found = find_entry(self._connection, self._model_id, kind, body, stop=self._old.size)
        if found is None:
            raise NotFoundError("what the challenge rests on was erased from the ledger's openings when it was too old")
        return self._proved(found, self._old)

    def after(self, drawn: _Drawn) -> dict[str, Any] | None:
        """None while the replay has not ended, or its event is not under a tree head yet."""
        if drawn.outcome is None:
            return None
        kind = next(kind for kind, outcome in OUTCOMES.items() if outcome is ReplayOutcome(drawn.outcome))
        body = {"stage": drawn.stage_key, "digest": drawn.digest}
        if drawn.differs_at is not None:  # a stage of its line that has another digest
            body = {"stage": drawn.differs_at}
        first, stop = self._old.size, self._newest.size
        found = find_entry(self._connection, self._model_id, kind, body, first=first, stop=stop)
        return self._proved(found, self._newest) if found else None

    def _proved(self, entry: Entry, head: SignedHead) -> dict[str, Any]:
        path = ledger.tree(self._connection, head.size).inclusion(entry.index)
        return {
            "leaf": bytes(entry.leaf).decode(),
            "opening": bytes(entry.opening or b"").decode(),
            "proof": write_proof(entry.index, path, head.note),
        }


def find_entry(
    connection: Connection, model_id: int, kind: EventKind, body: dict[str, Any], *, first: int = 0, stop: int
) -> Entry | None:
    """The first leaf of the kind about the model whose body has these fields, between two indexes."""
    values = {"model_id": model_id, "kind": kind.value, "body": Jsonb(body), "first": first, "stop": stop}
    with connection.cursor(row_factory=class_row(Entry)) as cursor:
        return cursor.execute(FIND_ENTRY, values).fetchone()


def _own(connection: Connection, head: TreeHead) -> SignedHead:
    with connection.cursor(row_factory=class_row(SignedHead)) as cursor:
        found = cursor.execute(GET_TREE_HEAD, {"size": head.size}).fetchone()
    if found is None or bytes(found.root) != head.root or read_head(found.note) != head:
        raise ConflictError("that is no tree head of this ledger: keep it, and ask the operator; it may be of a fork")
    return found


def _assembly(connection: Connection, model: Model, version: int) -> Assembly:
    with connection.cursor(row_factory=scalar_row) as cursor:
        body = cursor.execute(GET_ASSEMBLY, {"model_id": model.model_id, "version": version}).fetchone()
    if body is None:
        raise ConflictError("the model serves nothing yet: there is no stage to draw")
    return Assembly.from_json(body)


def _require_logged(connection: Connection, model: Model, size: int, digests: dict[str, str]) -> None:
    """Everything that could be drawn must be below the tree head: else it could be changed once the draw is known."""
    bodies = [(EventKind.VERSION_PUBLISHED, {"version": model.version})]
    bodies += [(EventKind.STAGE_TRAINED, {"stage": key, "digest": digest}) for key, digest in digests.items()]
    for kind, body in bodies:
        if find_entry(connection, model.model_id, kind, body, stop=size) is None:
            raise ConflictError(
                "that tree head does not tell of all that the model serves: have the witness cosign the newest one; "
                "where it is, what was trained longer ago than openings are kept (docs/ledger.md) cannot be challenged"
            )


def _of(cosigned: note.Note, name: str, cosignature: bytes) -> tuple[note.Signature, ...]:
    return tuple(each for each in cosigned.signatures if (each.name, each.blob) == (name, cosignature))


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode()
