"""The closed forms of a deletion certificate, version 2, and of its supplements: the verifier's own.

docs/schemas/ says the same for other tools; a test compares them. What each member means: docs/certificate.md.
"""

import re
from typing import Any

from service.evidence.shape import HEX, OBJECT_NAME, TIME, UUID

SIGNED, OFFLINE, REDERIVED = "signed by operator", "checked offline", "re-derived"
"""What a passed check rests on: the operator's word; the files at hand; digests computed again."""
CERTIFICATE = "https://expunge.dev/deletion-certificate/v2"
SUPPLEMENT = "https://expunge.dev/deletion-certificate-supplement/v1"
STATES = (
    "received",
    "awaiting_identity",
    "awaiting_approval",
    "deactivating",
    "deactivated",
    "erasing",
    "completed",
)
CLAIMS = {
    "influence-free": (
        REDERIVED,
        ("Every trained weight in the assembly of this version has a lineage without the records listed."),
    ),
    "retrain-equal": (
        SIGNED,
        (
            "Each stage served in this version is, as the stage that it is, bit for bit what training from"
            " nothing on its manifests gives with the same recipe on the same platform fingerprint. The "
            "assembly as a whole is not claimed to equal a full retrain."
        ),
    ),
    "deactivated": (
        SIGNED,
        (
            "No request that a replica begins after the state deactivated is answered from a tainted "
            "stage, no final check passes for one after it, and no replica that acknowledged hands a "
            "tainted byte to the kernel after it. Not covered: an answer that a replica fenced by expiry "
            "had already checked, bytes in socket buffers, proxies and caches."
        ),
    ),
    "erased": (
        SIGNED,
        (
            "The payloads of the records listed and every artefact of the stages listed as tainted were "
            "destroyed, with the keys that open them, and then found absent from the live store, at the times "
            "stated."
        ),
    ),
    "restricted": (
        SIGNED,
        "The records are sealed and out of service. Nothing was erased; the restriction can be lifted.",
    ),
}
"""The most that version 2 lets a certificate claim: the strength and the words."""
ASSUMED = {"A1", "A2", "backbone", "backups", "exports", "late_upload", "manifests", "observable", "other_identifiers",
           "overwritten_media"}  # fmt: skip
OPEN = (
    "memory_release_not_confirmed",
    "export_not_withdrawn",
    "retrain_equal_not_claimed",
    "late_upload_sweeps",
    "backups",
    "clock_went_back",
)
"""What a certificate may leave open."""

STAGE = {"type": "expunge stage v1", "recipe": HEX, "shard": int, "prefix": [int], "roots": [HEX],
         "parent": (None, HEX)}  # fmt: skip
OBJECT = {"object_name": OBJECT_NAME, "digest": (None, HEX), "destroyed_at": (None, TIME), "absent_at": [TIME]}
MEMBER = {"stage": HEX, "prefix": [int], "artifacts": [HEX]}
ASSEMBLY = {"type": "expunge assembly v1", "recipe": HEX, "aggregation": ("logits", "merged", "sums"),
            "members": [(None, MEMBER)]}  # fmt: skip
PLATFORM = {"fingerprint": HEX, "fields": [{"name": str, "value": str}], "stages": [HEX]}
PLACE = {"commitment": HEX, "index": int, "path": [HEX]}
MANIFEST = {
    "shard": int,
    "slice": int,
    "root": HEX,
    "rows": int,
    "holds": [PLACE],
    "lacks": [{"commitment": HEX, "before": (None, PLACE), "after": (None, PLACE)}],
}
OPEN_ITEM = {"code": OPEN, "name": str, "detail": str, "until": (None, TIME)}
ENTRY = {"leaf": str, "opening": str, "path": [HEX]}
LEDGER = {"checkpoint": str, "entries": [ENTRY]}
ISSUER = {"tool": str, "version": str, "issued_at": TIME}
PREDICATE: dict[str, Any] = {
    "request": {"id": UUID, "kind": ("erase", "restrict", "object"),
                "regime": (None, "gdpr", "ccpa", "voluntary"),
                "received_at": TIME, "due_at": TIME, "subject_commitment": HEX},
    "model": {"name": str, "recipe": HEX, "backbone": (None, HEX),
              "provenance": (None, "public", "own_clean", "own_contains_subjects")},
    "method": str,
    "outcome": ("erased", "restricted"),
    "before": {"version": int, "assembly": (None, HEX)},
    "after": {"version": int, "floor": int, "assembly": ASSEMBLY},
    "stages": [STAGE],
    "platforms": [PLATFORM],
    "replays": [{"stage": HEX, "digest": HEX, "at": TIME, "platform": (None, HEX),
                 "outcome": ("equal", "mismatch", "other_platform", "skipped", "failed")}],
    "records": [{"record_id": UUID, "commitment": HEX, "shard": int, "slice": int}],
    "touched": [{"shard": int, "slice": int, "root": HEX}],
    "cells": [{"shard": int, "slice": int, "before": HEX, "after": HEX}],
    "manifests": [MANIFEST],
    "tainted": [{"stage": STAGE, "artifacts": [OBJECT]}],
    "payloads": [{"shard": int, "slice": int, **OBJECT}],
    "times": [{"state": STATES, "at": TIME}],
    "clock_back_microseconds": int,
    "replicas": [{"process_id": UUID, "covers": int, "how": ("acknowledged", "fenced_by_expiry", "ended"),
                  "at": TIME, "freed": (True, False), "freed_at": (None, TIME)}],
    "claims": [{"claim": tuple(CLAIMS), "statement": str, "evidence": str, "checkable_by": str,
                "must_be_trusted": str, "strength": (SIGNED, OFFLINE, REDERIVED)}],
    "assumptions": [{"code": str, "statement": str}],
    "open_items": [OPEN_ITEM],
    "ledger": LEDGER,
    "issuer": ISSUER,
}  # fmt: skip
SUPPLEMENT_PREDICATE: dict[str, Any] = {
    "certificate": HEX,
    "number": int,
    "previous": (None, HEX),
    "request": UUID,
    "model": str,
    "sweeps": [{"sweep": (1, 2, 3), "objects": int, "absent_at": TIME, "reappeared": [OBJECT_NAME]}],
    "processes": [{"process_id": UUID, "how": ("freed", "ended", "fenced_by_expiry"), "at": TIME}],
    "exports": [{"export_id": UUID, "withdrawn_at": TIME}],
    "rebuild": (None, {"version": int, "floor": int, "published_at": TIME, "assembly": ASSEMBLY, "stages": [STAGE],
                       "platforms": [PLATFORM], "manifests": [MANIFEST]}),
    "lifted": (None, {"at": TIME, "version": (None, int)}),
    "open_items": [OPEN_ITEM],
    "ledger": {**LEDGER, "consistency": [HEX]},
    "issuer": ISSUER,
}  # fmt: skip


def statement_of(predicate_type: str, predicate: Any) -> dict[str, Any]:
    """The closed form of an in-toto Statement v1 around a predicate."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": str, "digest": {"sha256": HEX}}],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


SHAPES: dict[str, dict[str, Any]] = {
    CERTIFICATE: statement_of(CERTIFICATE, PREDICATE),
    SUPPLEMENT: statement_of(SUPPLEMENT, SUPPLEMENT_PREDICATE),
}
REPLACED = re.compile(r"https://expunge\.dev/deletion-certificate/v1")
"""What an earlier program wrote; it is refused by name."""
