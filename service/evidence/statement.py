"""What certificates and supplements say in the same way: times, events in the ledger, stages, platforms, open items."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from service.evidence.leaves import parse_leaf
from service.evidence.membership import show
from service.evidence.rows import EvidenceError, LedgerRows, ManifestRow, OpenRow, PlatformRow, RecordRow
from shards.stages import Stage

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"


def statement(predicate_type: str, name: str, digest: str, predicate: dict[str, Any]) -> dict[str, Any]:
    """An in-toto Statement v1 about one subject."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def moment(when: datetime) -> str:
    """RFC 3339 in UTC with microseconds: such texts sort as the moments do.

    Raises:
        EvidenceError: a time without a zone.
    """
    if when.tzinfo is None:
        raise EvidenceError("a time without a zone: read it as timestamptz")
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def issuer(version: str, issued_at: datetime) -> dict[str, Any]:
    """The program that wrote this, and when."""
    return {"tool": "expunge", "version": version, "issued_at": moment(issued_at)}


def by_key(stages: Iterable[Stage]) -> list[dict[str, Any]]:
    """Stages in an order of their own, each once."""
    return [stage.to_json() for stage in in_order(stages)]


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """Each stage once, by shard, depth and key."""
    return sorted({stage.key: stage for stage in stages}.values(), key=lambda s: (s.shard, s.depth, s.key))


def platforms(rows: Iterable[PlatformRow]) -> list[dict[str, Any]]:
    """Platforms by fingerprint."""
    return [
        {
            "fingerprint": row.fingerprint,
            "fields": [{"name": name, "value": row.fields[name]} for name in sorted(row.fields)],
            "stages": sorted(row.stages),
        }
        for row in sorted(rows, key=lambda row: row.fingerprint)
    ]


def manifests(rows: Iterable[ManifestRow], records: tuple[RecordRow, ...]) -> list[dict[str, Any]]:
    """Manifests by cell and root, each once, with the paths of the records of their cells."""
    each = {(row.shard, row.slice, row.root): row for row in rows}
    return [show(each[place], records) for place in sorted(each)]


def open_items(rows: Iterable[OpenRow]) -> list[dict[str, Any]]:
    """Open items as they are listed."""
    return [
        {"code": row.code, "name": row.name, "detail": row.detail, "until": moment(row.until) if row.until else None}
        for row in rows
    ]


def ledger(rows: LedgerRows) -> dict[str, Any]:
    """The events in the ledger's order, with the tree head that they are under."""
    return {
        "checkpoint": rows.checkpoint,
        "entries": [
            {
                "leaf": entry.leaf.decode(),
                "opening": entry.opening.decode(),
                "path": [each.hex() for each in entry.path],
            }
            for entry in sorted(rows.entries, key=lambda entry: entry.index)
        ],
    }


def clock_back(rows: LedgerRows, issued_at: datetime) -> int:
    """The furthest in microseconds that a time lies before that of an earlier event; the statement comes last."""
    times = [parse_leaf(e.leaf).time for e in sorted(rows.entries, key=lambda e: e.index)] + [moment(issued_at)]
    return largest_step_back([datetime.fromisoformat(time) for time in times])


def largest_step_back(times: Sequence[datetime]) -> int:
    """In microseconds, from the latest of the times before."""
    most, latest = 0, None
    for time in times:
        if latest is not None and time < latest:
            most = max(most, round((latest - time).total_seconds() * 1_000_000))
        latest = time if latest is None else max(latest, time)
    return most
