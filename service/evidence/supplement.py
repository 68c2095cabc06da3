"""Supplements: what became of a certificate's open ends, each a signed statement of its own about the certificate."""

from typing import Any

from service.evidence import statement
from service.evidence.dsse import sign
from service.evidence.rows import Addition, RebuildRow, RecordRow
from service.evidence.signers import SigningKey
from service.evidence.statement import PAYLOAD_TYPE, moment
from shards.digest import canonical

PREDICATE_TYPE = "https://expunge.dev/deletion-certificate-supplement/v1"


def build_supplement(addition: Addition) -> dict[str, Any]:
    """The statement to sign, the same for the same rows."""
    predicate = {
        "certificate": addition.certificate,
        "number": addition.number,
        "previous": addition.previous,
        "request": str(addition.request_id),
        "model": addition.model_name,
        "sweeps": [
            {
                "sweep": row.sweep,
                "objects": row.objects,
                "absent_at": moment(row.absent_at),
                "reappeared": sorted(row.reappeared),
            }
            for row in addition.sweeps
        ],
        "processes": [
            {"process_id": str(row.process_id), "how": row.how, "at": moment(row.at)}
            for row in sorted(addition.processes, key=lambda row: row.process_id.bytes)
        ],
        "exports": [{"export_id": name, "withdrawn_at": moment(when)} for name, when in sorted(addition.exports)],
        "rebuild": _rebuild(addition.rebuild, addition.records) if addition.rebuild else None,
        "lifted": {"at": moment(lifted.at), "version": lifted.version} if (lifted := addition.lifted) else None,
        "open_items": statement.open_items(addition.open_items),
        "ledger": {
            **statement.ledger(addition.ledger),
            "consistency": [each.hex() for each in addition.ledger.consistency],
        },
        "issuer": statement.issuer(addition.tool_version, addition.issued_at),
    }
    name = f"deletion certificate of {addition.request_id} for {addition.model_name}"
    return statement.statement(PREDICATE_TYPE, name, addition.certificate, predicate)


def issue_supplement(addition: Addition, key: SigningKey) -> dict[str, Any]:
    """The signed supplement."""
    return sign(canonical(build_supplement(addition)), PAYLOAD_TYPE, key)


def _rebuild(row: RebuildRow, records: tuple[RecordRow, ...]) -> dict[str, Any]:
    return {
        "version": row.version,
        "floor": row.floor,
        "published_at": moment(row.published_at),
        "assembly": dict(row.assembly),
        "stages": statement.by_key(row.stages),
        "platforms": statement.platforms(row.platforms),
        "manifests": statement.manifests(row.manifests, records),
    }
