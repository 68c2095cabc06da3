"""The deletion certificate: an in-toto Statement v1 of what was done, from committed rows alone.

What each field and claim means: docs/certificate.md. `service.evidence.verify` reads it and shares no code.
"""

from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.evidence.dsse import sign
from service.evidence.rows import Evidence, ObjectRow
from service.evidence.wording import ENGINES, METHOD, NOT_RETRAIN_EQUAL, assumptions, claims
from shards.assembly import Assembly
from shards.digest import canonical
from shards.stages import Stage

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://expunge.dev/deletion-certificate/v1"


class EvidenceError(ValueError):
    """The rows do not make a certificate; the message says what is missing."""


def build(evidence: Evidence) -> dict[str, Any]:
    """The statement to sign, the same for the same evidence.

    Raises:
        EvidenceError: an outcome that has no certificate, or a time without a zone.
    """
    if evidence.outcome not in {"erased", "restricted"}:
        raise EvidenceError(f"an outcome {evidence.outcome!r} has no certificate: only erased and restricted have")
    assembly = Assembly.from_json(evidence.assembly_after)
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": f"{evidence.model_name}@{evidence.version_after}", "digest": {"sha256": assembly.digest}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            **_what(evidence, assembly),
            **_removed(evidence),
            **_course(evidence),
            "claims": claims(evidence.outcome, evidence.provenance, retrain_equal=evidence.retrain_equal),
            "assumptions": assumptions(evidence.provenance, evidence.backup_retention_days),
            "open_items": _open_items(evidence),
            "issuer": {
                "tool": "expunge",
                "version": evidence.tool_version,
                "issued_at": _moment(evidence.issued_at),
            },
        },
    }


def issue(evidence: Evidence, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The signed certificate: a DSSE envelope around the statement's canonical JSON."""
    return sign(canonical(build(evidence)), PAYLOAD_TYPE, key)


def _what(evidence: Evidence, assembly: Assembly) -> dict[str, Any]:
    return {
        "request": {
            "id": str(evidence.request_id),
            "kind": evidence.kind,
            "regime": evidence.regime,
            "received_at": _moment(evidence.received_at),
            "due_at": _moment(evidence.due_at),
            "subject_commitment": evidence.subject_commitment.hex(),
        },
        "model": {
            "name": evidence.model_name,
            "recipe": evidence.recipe_digest,
            "backbone": evidence.backbone_digest,
            "provenance": evidence.provenance,
        },
        "method": METHOD[evidence.outcome].format(ENGINES[evidence.engine]),
        "outcome": evidence.outcome,
        "before": {"version": evidence.version_before, "assembly": evidence.assembly_before},
        "after": {"version": evidence.version_after, "floor": evidence.floor, "assembly": assembly.to_json()},
        "stages": [stage.to_json() for stage in _by_key(evidence.served_stages)],
        "platforms": sorted(set(evidence.platforms)),
    }


def _removed(evidence: Evidence) -> dict[str, Any]:
    records = sorted(evidence.records, key=lambda record: record.record_id.bytes)
    return {
        "records": {
            "count": len(records),
            "list": [{"record_id": str(record.record_id), "commitment": record.commitment.hex()} for record in records],
        },
        "touched": [
            {"shard": cell.shard, "slice": cell.slice, "root": cell.root} for cell in sorted(set(evidence.touched))
        ],
        "cells": [
            {"shard": cell.shard, "slice": cell.slice, "before": cell.before, "after": cell.after}
            for cell in sorted(evidence.cells, key=lambda cell: (cell.shard, cell.slice, cell.before))
        ],
        "tainted": [
            {
                "stage": stage.to_json(),
                "artifacts": _objects(tuple(row for row in evidence.tainted_objects if row.stage_key == stage.key)),
            }
            for stage in _by_key(evidence.tainted_stages)
        ],
        "payloads": [
            {"shard": row.shard, "slice": row.slice, **_object(row)}
            for row in sorted(evidence.payloads, key=lambda row: row.object_name)
        ],
    }


def _course(evidence: Evidence) -> dict[str, Any]:
    return {
        "times": [{"state": row.state, "at": _moment(row.at)} for row in evidence.times],
        "replicas": [
            {
                "process_id": str(row.process_id),
                "covers": row.covers,
                "how": row.how,
                "at": _moment(row.at),
                "freed": row.freed,
                "freed_at": _moment(row.freed_at) if row.freed_at else None,
            }
            for row in sorted(evidence.replicas, key=lambda row: row.process_id.bytes)
        ],
    }


def _open_items(evidence: Evidence) -> list[dict[str, str]]:
    unconfirmed = [
        {"code": "memory_release_not_confirmed", "detail": str(row.process_id)}
        for row in sorted(evidence.replicas, key=lambda row: row.process_id.bytes)
        if not row.freed
    ]
    if not evidence.retrain_equal:
        unconfirmed.append({"code": "retrain_equal_not_claimed", "detail": NOT_RETRAIN_EQUAL})
    return unconfirmed + [{"code": code, "detail": detail} for code, detail in evidence.open_items]


def _objects(rows: tuple[ObjectRow, ...]) -> list[dict[str, Any]]:
    return [_object(row) for row in sorted(rows, key=lambda row: row.object_name)]


def _object(row: ObjectRow) -> dict[str, Any]:
    return {
        "object_name": row.object_name,
        "digest": row.digest,
        "destroyed_at": _moment(row.destroyed_at) if row.destroyed_at else None,
        "absent_at": _moment(row.absent_at) if row.absent_at else None,
    }


def _by_key(stages: tuple[Stage, ...]) -> list[Stage]:
    return sorted({stage.key: stage for stage in stages}.values(), key=lambda s: (s.shard, s.depth, s.key))


def _moment(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds: such texts sort as the moments do."""
    if moment.tzinfo is None:
        raise EvidenceError("a time without a zone: read it as timestamptz")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
