"""The ledger behind a sample certificate: events as the programs record them, leaves, tree heads and paths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.evidence.leaves import Sealed, seal
from service.evidence.merkle import Tree, leaf_hash, root_of_hashes
from service.evidence.rows import EntryRow, Evidence, LedgerRows
from service.evidence.tree_head import TreeHead, sign_head
from shards.assembly import Assembly

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ORIGIN = "expunge/sample"
MODEL = 3


@dataclass(frozen=True)
class Told:
    """An event."""

    event_id: UUID
    kind: str
    request_id: UUID | None
    model_id: int | None
    body: dict[str, Any]
    created_at: datetime


class Log:
    """A ledger in memory."""

    def __init__(self, told: Sequence[Told], origin: str = ORIGIN) -> None:
        self.origin = origin
        self.told = list(told)
        with patch("service.evidence.leaves.secrets.token_hex", lambda count: "5a" * count):
            self.sealed: list[Sealed] = list(seal(self.told, 0))
        self.hashes = [leaf_hash(each.leaf) for each in self.sealed]

    def tree(self, size: int) -> Tree:
        def read(level: int, tile: int, width: int) -> Sequence[bytes]:
            span = 256**level
            first = tile * 256
            return [root_of_hashes(self.hashes[k * span : (k + 1) * span]) for k in range(first, first + width)]

        return Tree(size, read)

    def checkpoint(self, size: int, key: Ed25519PrivateKey = KEY) -> str:
        return sign_head(TreeHead(self.origin, size, self.tree(size).root()), key)

    def rows(self, size: int, about: Sequence[int], since: int | None = None) -> LedgerRows:
        """The entries at these places under the tree head of that size."""
        tree = self.tree(size)
        return LedgerRows(
            checkpoint=self.checkpoint(size),
            entries=tuple(
                EntryRow(
                    index=at,
                    leaf=self.sealed[at].leaf,
                    opening=self.sealed[at].opening,
                    path=tuple(tree.inclusion(at)),
                )
                for at in about
            ),
            consistency=tuple(tree.consistency(since)) if since is not None else (),
        )


def event(number: int, kind: str, at: datetime, body: dict[str, Any], request_id: UUID | None = None) -> Told:
    return Told(UUID(int=1000 + number), kind, request_id, MODEL, body, at)


def events_of(evidence: Evidence) -> list[Told]:
    """What an honest operator's programs record of a deletion, in the order of causes."""
    mine = evidence.request_id
    entered = {row.state: row.at for row in evidence.times}
    rows: list[tuple[datetime, str, dict[str, Any], UUID | None]] = [
        (
            entered["received"],
            "request.received",
            {
                "kind": evidence.kind,
                "subject_commitment": evidence.subject_commitment.hex(),
                "actor": "abcdefgh",
                "models": [evidence.model_name],
            },
            mine,
        ),
        (
            entered["deactivating"],
            "version.published",
            {
                "version": evidence.version_after,
                "floor": evidence.floor,
                "assembly": Assembly.from_json(evidence.assembly_after).digest,
                "cause": "deactivate",
                "canonical": False,
            },
            None,
        ),
        (
            entered["deactivating"],
            "target.deactivating",
            {
                "version": evidence.version_after,
                "records": len(evidence.records),
                "stages": [stage.key for stage in evidence.tainted_stages],
            },
            mine,
        ),
    ]
    kinds = {"acknowledged": "replica.acknowledged", "fenced_by_expiry": "replica.fenced", "ended": "replica.ended"}
    for row in sorted(evidence.replicas, key=lambda row: row.at):
        body: dict[str, Any] = {"process_id": str(row.process_id)}
        body |= {"acknowledged": {"covers": row.covers}, "fenced_by_expiry": {"floor": evidence.floor}}.get(row.how, {})
        rows.append((row.at, kinds[row.how], body, None))
    rows.append((entered["deactivated"], "target.deactivated", {"version": evidence.version_after}, mine))
    if evidence.outcome == "erased":
        rows.append((entered["erasing"], "target.erasing", {"artifacts": []}, mine))
        for each in (*evidence.payloads, *evidence.tainted_objects):
            if each.destroyed_at is not None:
                body = {
                    "object_name": each.object_name,
                    "digest": each.digest,
                    "absent_at": str(each.destroyed_at),
                }
                rows.append((each.destroyed_at, "artifact.destroyed", body, mine))
    return [event(number, kind, when, body, request) for number, (when, kind, body, request) in enumerate(rows)]


def foreign(number: int, at: datetime) -> Told:
    """An event of somebody else's."""
    return event(500 + number, "stage.cancelled", at, {"stage": f"{number:064x}"}, UUID(int=4))


def log_of(evidence: Evidence, after: Sequence[Told] = ()) -> tuple[Log, list[int], int]:
    """The log, the places of the deletion's events, and the size that it had when the certificate was made."""
    mine = events_of(evidence)
    start = mine[0].created_at - timedelta(seconds=1)
    before = [foreign(number, start) for number in range(5)]
    between = [foreign(9, mine[-1].created_at)]
    size = len(before) + len(mine) + len(between)
    log = Log([*before, *mine, *between, *after])
    return log, list(range(len(before), len(before) + len(mine))), size


def with_ledger(evidence: Evidence) -> Evidence:
    """The evidence with the events that it rests on."""
    log, about, size = log_of(evidence)
    return replace(evidence, ledger=log.rows(size, about))
