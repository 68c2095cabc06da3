"""The deletion certificate: an in-toto Statement v1 of what was done, from committed rows alone.

What each field and claim means: docs/certificate.md. `service.evidence.verify` reads it and shares no code.
"""

from datetime import timedelta
from typing import Any

from service.evidence import statement, wording
from service.evidence.dsse import sign
from service.evidence.rows import Evidence, EvidenceError, ObjectRow, OpenRow
from service.evidence.signers import SigningKey
from service.evidence.statement import PAYLOAD_TYPE, STATEMENT_TYPE, moment
from shards.assembly import Assembly
from shards.digest import canonical, sha256_hex

__all__ = ["PAYLOAD_TYPE", "PREDICATE_TYPE", "STATEMENT_TYPE", "EvidenceError", "build", "digest_of_envelope", "issue"]

PREDICATE_TYPE = "https://expunge.dev/deletion-certificate/v2"
SWEEPS = (timedelta(minutes=1), timedelta(hours=1), timedelta(days=1))
"""When destroyed objects are looked for again (rule 22)."""
CLOCK_SLACK = 1_000_000
"""Steps back of a clock below this many microseconds are no open item: events of two programs may overtake."""


def build(evidence: Evidence) -> dict[str, Any]:
    """The statement to sign, the same for the same evidence.

    Raises:
        EvidenceError: an outcome that has no certificate, or a time without a zone.
    """
    if evidence.outcome not in {"erased", "restricted"}:
        raise EvidenceError(f"an outcome {evidence.outcome!r} has no certificate: only erased and restricted have")
    assembly = Assembly.from_json(evidence.assembly_after)
    predicate = {
        **_what(evidence, assembly),
        **_removed(evidence),
        **_course(evidence),
        "claims": wording.claims(evidence.outcome, evidence.provenance, retrain_equal=evidence.retrain_equal),
        "assumptions": wording.assumptions(evidence.provenance, evidence.key_backup_days),
        "open_items": statement.open_items(open_rows(evidence)),
        "ledger": statement.ledger(evidence.ledger),
        "issuer": statement.issuer(evidence.tool_version, evidence.issued_at),
    }
    name = f"{evidence.model_name}@{evidence.version_after}"
    return statement.statement(PREDICATE_TYPE, name, assembly.digest, predicate)


def issue(evidence: Evidence, key: SigningKey) -> dict[str, Any]:
    """The signed certificate: a DSSE envelope around the statement's canonical JSON."""
    return sign(canonical(build(evidence)), PAYLOAD_TYPE, key)


def digest_of_envelope(envelope: dict[str, Any]) -> str:
    """What a certificate is known by: SHA-256 of its envelope in canonical JSON, which is how the API gives it."""
    return sha256_hex(canonical(envelope))


def open_rows(evidence: Evidence) -> list[OpenRow]:
    """What is not confirmed, or not over, at the time of issue."""
    rows = [
        OpenRow(code="memory_release_not_confirmed", name=str(row.process_id), detail=wording.NOT_FREED[row.how])
        for row in sorted(evidence.replicas, key=lambda row: row.process_id.bytes)
        if not row.freed
    ]
    if not evidence.retrain_equal:
        rows.append(
            OpenRow(code="retrain_equal_not_claimed", name=evidence.model_name, detail=wording.NOT_RETRAIN_EQUAL)
        )
    rows += [OpenRow(code="export_not_withdrawn", name=name, detail=detail) for name, detail in evidence.exports]
    if evidence.outcome == "erased":
        rows.append(
            OpenRow(
                code="late_upload_sweeps",
                name="artefact store",
                detail=wording.SWEPT,
                until=evidence.issued_at + SWEEPS[-1],
            )
        )
        days = evidence.key_backup_days
        until = None if days is None else evidence.issued_at + timedelta(days=days)
        rows.append(OpenRow(code="backups", name="key store", detail=wording.backups(days), until=until))
    back = statement.clock_back(evidence.ledger, evidence.issued_at)
    if back >= CLOCK_SLACK:
        detail = f"a time lies {back / 1e6:.6f} s before that of an earlier event: order is by the ledger, not by clock"
        rows.append(OpenRow(code="clock_went_back", name="clock", detail=detail))
    return rows


def _what(evidence: Evidence, assembly: Assembly) -> dict[str, Any]:
    return {
        "request": {
            "id": str(evidence.request_id),
            "kind": evidence.kind,
            "regime": evidence.regime,
            "received_at": moment(evidence.received_at),
            "due_at": moment(evidence.due_at),
            "subject_commitment": evidence.subject_commitment.hex(),
        },
        "model": {
            "name": evidence.model_name,
            "recipe": evidence.recipe_digest,
            "backbone": evidence.backbone_digest,
            "provenance": evidence.provenance,
        },
        "method": wording.METHOD[evidence.outcome].format(wording.ENGINES[evidence.engine]),
        "outcome": evidence.outcome,
        "before": {"version": evidence.version_before, "assembly": evidence.assembly_before},
        "after": {"version": evidence.version_after, "floor": evidence.floor, "assembly": assembly.to_json()},
        "stages": statement.by_key(evidence.served_stages),
        "platforms": statement.platforms(evidence.platforms),
        "replays": [
            {
                "stage": row.stage,
                "digest": row.digest,
                "at": moment(row.at),
                "platform": row.platform,
                "outcome": row.outcome,
            }
            for row in sorted(evidence.replays, key=lambda row: row.stage)
        ],
    }


def _removed(evidence: Evidence) -> dict[str, Any]:
    return {
        "records": [
            {
                "record_id": str(record.record_id),
                "commitment": record.commitment.hex(),
                "shard": record.shard,
                "slice": record.slice,
            }
            for record in sorted(evidence.records, key=lambda record: record.record_id.bytes)
        ],
        "touched": [
            {"shard": cell.shard, "slice": cell.slice, "root": cell.root} for cell in sorted(set(evidence.touched))
        ],
        "cells": [
            {"shard": cell.shard, "slice": cell.slice, "before": cell.before, "after": cell.after}
            for cell in sorted(evidence.cells, key=lambda cell: (cell.shard, cell.slice, cell.before))
        ],
        "manifests": statement.manifests(evidence.manifests, evidence.records),
        "tainted": [
            {
                "stage": stage.to_json(),
                "artifacts": _objects(tuple(row for row in evidence.tainted_objects if row.stage_key == stage.key)),
            }
            for stage in statement.in_order(evidence.tainted_stages)
        ],
        "payloads": [
            {"shard": row.shard, "slice": row.slice, **_object(row)}
            for row in sorted(evidence.payloads, key=lambda row: row.object_name)
        ],
    }


def _course(evidence: Evidence) -> dict[str, Any]:
    return {
        "times": [{"state": row.state, "at": moment(row.at)} for row in evidence.times],
        "clock_back_microseconds": statement.clock_back(evidence.ledger, evidence.issued_at),
        "replicas": [
            {
                "process_id": str(row.process_id),
                "covers": row.covers,
                "how": row.how,
                "at": moment(row.at),
                "freed": row.freed,
                "freed_at": moment(row.freed_at) if row.freed_at else None,
            }
            for row in sorted(evidence.replicas, key=lambda row: row.process_id.bytes)
        ],
    }


def _objects(rows: tuple[ObjectRow, ...]) -> list[dict[str, Any]]:
    return [_object(row) for row in sorted(rows, key=lambda row: row.object_name)]


def _object(row: ObjectRow) -> dict[str, Any]:
    looks = [row.destroyed_at, row.absent_at] if row.destroyed_at and row.absent_at else []
    return {
        "object_name": row.object_name,
        "digest": row.digest,
        "destroyed_at": moment(row.destroyed_at) if row.destroyed_at else None,
        "absent_at": [moment(each) for each in looks if each],
    }
