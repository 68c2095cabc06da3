"""The closed form of a deletion certificate, version 1: the verifier's own, checked before anything is read.

docs/schemas/deletion-certificate-v1.json says the same for other tools; a test compares them.
"""

import re
from datetime import datetime
from typing import Any

SIGNED, OFFLINE, REDERIVED = "signed by operator", "checked offline", "re-derived"
"""What a passed check rests on: the operator's word; the file at hand; digests computed again."""

HEX = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OBJECT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")
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
            "destroyed and then found absent from the live store, at the times stated."
        ),
    ),
    "restricted": (
        SIGNED,
        "The records are sealed and out of service. Nothing was erased; the restriction can be lifted.",
    ),
}
"""The most that version 1 lets a certificate claim: the strength and the words."""
ASSUMED = {"A1", "A2", "backbone", "backups", "exports", "late_upload", "observable", "other_identifiers",
           "overwritten_media"}  # fmt: skip

# A dict is an object with exactly these members, a list holds any number of its one form, a tuple lists
# alternatives, a pattern matches a whole text, `str` is a text that is not empty, `int` a whole number
# from 0; anything else is itself.
STAGE = {"type": "expunge stage v1", "recipe": HEX, "shard": int, "prefix": [int], "roots": [HEX],
         "parent": (None, HEX)}  # fmt: skip
OBJECT = {
    "object_name": OBJECT_NAME,
    "digest": (None, HEX),
    "destroyed_at": (None, TIME),
    "absent_at": (None, TIME),
}
MEMBER = {"stage": HEX, "prefix": [int], "artifacts": [HEX]}
ASSEMBLY = {"type": "expunge assembly v1", "recipe": HEX, "aggregation": ("logits", "merged", "sums"),
            "members": [(None, MEMBER)]}  # fmt: skip
PREDICATE = {
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
    "platforms": [str],
    "records": {"count": int, "list": [{"record_id": UUID, "commitment": HEX}]},
    "touched": [{"shard": int, "slice": int, "root": HEX}],
    "cells": [{"shard": int, "slice": int, "before": HEX, "after": HEX}],
    "tainted": [{"stage": STAGE, "artifacts": [OBJECT]}],
    "payloads": [{"shard": int, "slice": int, **OBJECT}],
    "times": [{"state": STATES, "at": TIME}],
    "replicas": [{"process_id": UUID, "covers": int, "how": ("acknowledged", "fenced_by_expiry", "ended"),
                  "at": TIME, "freed": (True, False), "freed_at": (None, TIME)}],
    "claims": [{"claim": tuple(CLAIMS), "statement": str, "evidence": str, "checkable_by": str,
                "must_be_trusted": str, "strength": (SIGNED, OFFLINE, REDERIVED)}],
    "assumptions": [{"code": str, "statement": str}],
    "open_items": [{"code": str, "detail": str}],
    "issuer": {"tool": str, "version": str, "issued_at": TIME},
}  # fmt: skip
SHAPE = {
    "_type": "https://in-toto.io/Statement/v1",
    "subject": [{"name": str, "digest": {"sha256": HEX}}],
    "predicateType": "https://expunge.dev/deletion-certificate/v1",
    "predicate": PREDICATE,
}


def misfit(value: Any, shape: Any, where: str = "statement") -> str | None:
    """Where and how a value departs from its closed form; None if it does not."""
    if isinstance(shape, tuple):
        alike = [alternative for alternative in shape if isinstance(value, dict) and isinstance(alternative, dict)]
        found = [misfit(value, alternative, where) for alternative in alike or shape]
        return None if None in found else found[0]
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        parts = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        if odd := sorted(value.keys() ^ shape.keys()):
            return f"{where} {'lacks' if odd[0] in shape else 'has the unknown member'} {odd[0]!r}"
        parts = [(value[name], inner, f"{where}.{name}") for name, inner in shape.items()]
    elif not _is_leaf(value, shape):
        return f"{where} is not what version 1 allows there"
    return next((text for part in parts if (text := misfit(*part))), None)


def _is_leaf(value: Any, shape: Any) -> bool:
    if shape is int:
        return type(value) is int and value >= 0
    if shape is str:
        return isinstance(value, str) and bool(value)
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and bool(shape.fullmatch(value))
        return fits and (shape is not TIME or _is_moment(value))
    return type(value) is type(shape) and value == shape


def _is_moment(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:  # the 31st of February
        return False
    return True
