"""One honest certificate on a grid of 2 shards and 3 slices, what it may be tampered with, and its schema."""

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from certificate_ledger import with_ledger
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from service.evidence.certificate import PAYLOAD_TYPE, build
from service.evidence.dsse import sign
from service.evidence.keys import public_pem
from service.evidence.rows import (
    CellRow,
    Evidence,
    LedgerRows,
    ManifestRow,
    ObjectRow,
    PlatformRow,
    RecordRow,
    ReplayRow,
    ReplicaRow,
    TimeRow,
)
from shards.assembly import Assembly, Member
from shards.digest import canonical, digest_of, sha256_hex
from shards.merkle import root
from shards.stages import CellRoot, Stage, chain

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PEM = public_pem(KEY)
RECIPE = sha256_hex(b"recipe")
START = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)
HURT = (0, 1)
"""The cell that held the deleted record."""
RECORD = bytes.fromhex(sha256_hex(b"record"))
PLATFORM = {"dtype": "float32", "isa": "avx2"}
EMPTY = LedgerRows(checkpoint="", entries=())
"""In the place of a ledger's rows until `with_ledger` has made them."""


def commitments(shard: int, part: int, *, deleted: bool = False, generation: int = 1) -> tuple[bytes, ...]:
    """A cell's manifest, with the deleted record or without."""
    others = [bytes.fromhex(sha256_hex(f"{shard}/{part}/{i}".encode())) for i in range(3 * generation)]
    return tuple(sorted([*others, RECORD] if deleted else others))


def manifest(shard: int, part: int, *, deleted: bool = False, generation: int = 1) -> str:
    """Its root."""
    return root(commitments(shard, part, deleted=deleted, generation=generation)).hex()


def manifest_row(shard: int, part: int, *, deleted: bool = False, generation: int = 1) -> ManifestRow:
    """It as a certificate's writer reads it."""
    found = commitments(shard, part, deleted=deleted, generation=generation)
    return ManifestRow(shard=shard, slice=part, root=root(found).hex(), commitments=found)


def artifact_digest(stage: Stage) -> str:
    return sha256_hex(artifact_bytes(stage))


def artifact_bytes(stage: Stage) -> bytes:
    return b"weights of " + stage.key.encode()


def payload_bytes(generation: int) -> bytes:
    return b"payloads %d" % generation


def at(milliseconds: int) -> datetime:
    return START + timedelta(milliseconds=milliseconds)


def _stages() -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """Served after the deletion, and tainted. Shard 0 falls back to depth 1, shard 1 stays whole."""
    hurt = {part: manifest(0, part, deleted=(0, part) == HURT, generation=2) for part in range(3)}
    whole = {part: manifest(1, part) for part in range(3)}
    first = chain(RECIPE, 0, (0, 1, 2), hurt)
    second = chain(RECIPE, 0, (1, 2, 0), hurt)
    return (first[0], *chain(RECIPE, 1, (0, 1, 2), whole)), (*first[1:], *second)


def sample() -> Evidence:
    """Evidence of an erasure, as the rows of an honest operator give it."""
    served, tainted = _stages()
    last = served[3]
    members = (
        Member(served[0].key, (0,), (artifact_digest(served[0]),)),
        Member(last.key, last.prefix, tuple(artifact_digest(stage) for stage in served[1:])),
    )
    held = [manifest(*HURT, deleted=True, generation=generation) for generation in (1, 2)]
    objects = tuple(
        ObjectRow(
            object_name=f"stages/{stage.key}/{artifact_digest(stage)}/{UUID(int=i)}",
            digest=artifact_digest(stage),
            destroyed_at=at(60),
            absent_at=at(61),
            stage_key=stage.key,
        )
        for i, stage in enumerate(tainted)
    )
    fingerprint = digest_of(PLATFORM)
    evidence = Evidence(
        request_id=UUID(int=7),
        kind="erase",
        regime="gdpr",
        received_at=START - timedelta(hours=1),
        due_at=START + timedelta(days=30),
        subject_commitment=bytes(32),
        outcome="erased",
        model_name="reviews",
        recipe_digest=RECIPE,
        backbone_digest=sha256_hex(b"backbone"),
        provenance="public",
        version_before=4,
        assembly_before=sha256_hex(b"before"),
        version_after=5,
        floor=5,
        assembly_after=Assembly(RECIPE, members).to_json(),
        served_stages=served,
        tainted_stages=tainted,
        tainted_objects=objects,
        touched=tuple(CellRoot(*HURT, held_root) for held_root in held),
        cells=(CellRow(shard=0, slice=1, before=held[1], after=manifest(*HURT, generation=2)),),
        records=(RecordRow(record_id=UUID(int=99), commitment=RECORD, shard=HURT[0], slice=HURT[1]),),
        payloads=tuple(
            ObjectRow(
                object_name=f"cells/{held_root}/{UUID(int=generation)}.parquet",
                digest=sha256_hex(payload_bytes(generation)),
                shard=HURT[0],
                slice=HURT[1],
                destroyed_at=at(50 + generation),
                absent_at=at(80),
            )
            for generation, held_root in enumerate(held)
        ),
        times=tuple(
            TimeRow(state=state, at=at(moment))
            for state, moment in (
                ("received", 0),
                ("deactivating", 5),
                ("deactivated", 12),
                ("erasing", 40),
                ("completed", 90),
            )
        ),
        replicas=(
            ReplicaRow(process_id=UUID(int=1), covers=5, how="acknowledged", at=at(11), freed=True),
            ReplicaRow(process_id=UUID(int=2), covers=4, how="fenced_by_expiry", at=at(12), freed=False),
            ReplicaRow(process_id=UUID(int=3), covers=4, how="ended", at=at(9), freed=True, freed_at=at(9)),
        ),
        manifests=(
            manifest_row(*HURT, deleted=True, generation=1),
            manifest_row(*HURT, deleted=True, generation=2),
            manifest_row(*HURT, generation=2),
        ),
        platforms=(PlatformRow(fingerprint=fingerprint, fields=PLATFORM, stages=tuple(s.key for s in served)),),
        replays=(
            ReplayRow(
                stage=served[0].key,
                digest=artifact_digest(served[0]),
                outcome="equal",
                at=at(-5000),
                platform=fingerprint,
            ),
        ),
        ledger=EMPTY,
        tool_version="0.1.0",
        issued_at=at(90),
        key_backup_days=35,
    )
    return with_ledger(evidence)


def restricted() -> Evidence:
    """Evidence of a restriction: nothing destroyed, no cell written again."""
    erased = sample()
    alive = tuple(replace(row, destroyed_at=None, absent_at=None) for row in erased.tainted_objects)
    times = tuple(row for row in erased.times if row.state != "erasing")
    made = replace(
        erased, kind="restrict", outcome="restricted", tainted_objects=alive, cells=(), payloads=(), times=times
    )
    return with_ledger(made)


def resigned(tamper: Callable[[dict[str, Any]], None], evidence: Evidence | None = None) -> dict[str, Any]:
    """The envelope of a certificate that was changed and then signed by the right key: a lying operator."""
    statement = copy.deepcopy(build(evidence or sample()))
    tamper(statement)
    return sign(canonical(statement), PAYLOAD_TYPE, KEY)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every value in a JSON document that is no object or list."""
    if not isinstance(value, dict | list):
        yield path
        return
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, step))


def put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set one leaf."""
    for step in path[:-1]:
        document = document[step]
    document[path[-1]] = value


def other(value: Any) -> Any:
    """A value of the same kind that is not this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if value is None:
        return "0" * 64
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{int(value, 16) ^ 1:064x}"
    if re.fullmatch(r".*T.*\.[0-9]{6}Z", value):  # a time, a microsecond away
        return f"{value[:-2]}{(int(value[-2]) + 1) % 10}Z"
    return value[:-1] + ("0" if value[-1] != "0" else "1")


def schema_of(shape: Any) -> dict[str, Any]:  # noqa: PLR0911 - a case a line
    """The JSON Schema (2020-12) of a closed form in `service.evidence.form`."""
    if isinstance(shape, tuple):
        if not any(isinstance(alternative, dict | list | re.Pattern | type) for alternative in shape):
            return {"enum": list(shape)}
        return {"anyOf": [schema_of(alternative) for alternative in shape]}
    if isinstance(shape, list):
        return {"type": "array", "items": schema_of(shape[0])}
    if isinstance(shape, dict):
        return {
            "type": "object",
            "properties": {name: schema_of(inner) for name, inner in shape.items()},
            "required": list(shape),
            "additionalProperties": False,
        }
    if isinstance(shape, re.Pattern):
        return {"type": "string", "pattern": f"^(?:{shape.pattern})$"}
    if shape is int:
        return {"type": "integer", "minimum": 0}
    if shape is str:
        return {"type": "string", "minLength": 1}
    return {"type": "null"} if shape is None else {"const": shape}
