"""Payload files: the records of one cell as Parquet, the only place where a person's data lies."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from shards.manifest import Record

SCHEMA = pa.schema(
    [
        ("record_id", pa.binary(16)),
        ("generation", pa.int64()),
        ("salt", pa.binary(32)),
        ("text", pa.string()),
        ("label", pa.string()),
        ("image", pa.binary()),
        ("owner", pa.binary(16)),
        ("prior", pa.int32()),
        (
            "aliases",
            pa.list_(pa.struct([("subject_id", pa.binary(16)), ("type", pa.string()), ("digest", pa.binary(32))])),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Whose:
    """Whom a record concerns: what Postgres knows of it, for a database that lost it. No part of any manifest."""

    owner: UUID
    prior: int | None
    """The owner's class of deletion prior in the dataset."""
    aliases: tuple[tuple[UUID, str, bytes], ...]
    """Subject, type and keyed digest, of everybody whom the record concerns; each has one at least."""

    @property
    def subjects(self) -> frozenset[UUID]:
        """The owner and the others."""
        return frozenset(subject_id for subject_id, _, _ in self.aliases)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record, the cell generation that it came with, and whose it is."""

    generation: int
    record: Record
    whose: Whose | None
    """None: written by a version that did not say."""


def object_name(digest: str) -> str:
    """A new name for a cell's payloads, below a digest that tells files apart; never used before (rule 18)."""
    return f"cells/{digest}/{uuid4()}.parquet"


def encode(records: Iterable[StoredRecord]) -> bytes:
    """Parquet bytes, sorted by record id. No column statistics: a footer's minimum would be a copy of a payload."""
    rows = sorted(records, key=lambda stored: stored.record.record_id.bytes)
    columns = {
        "record_id": [stored.record.record_id.bytes for stored in rows],
        "generation": [stored.generation for stored in rows],
        "salt": [stored.record.salt for stored in rows],
        "text": [stored.record.text for stored in rows],
        "label": [stored.record.label for stored in rows],
        "image": [stored.record.image or None for stored in rows],
        "owner": [stored.whose and stored.whose.owner.bytes for stored in rows],
        "prior": [stored.whose and stored.whose.prior for stored in rows],
        "aliases": [stored.whose and _aliases(stored.whose) for stored in rows],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()


def decode(data: bytes) -> list[StoredRecord]:
    """The records of a payload file."""
    table = pq.read_table(io.BytesIO(data), schema=SCHEMA)
    return [StoredRecord(row["generation"], _record(row), _whose(row)) for row in table.to_pylist()]


def _record(row: dict[str, Any]) -> Record:
    return Record(UUID(bytes=row["record_id"]), row["salt"], row["text"], row["label"], row["image"] or b"")


def _aliases(whose: Whose) -> list[dict[str, Any]]:
    return [{"subject_id": found.bytes, "type": kind, "digest": digest} for found, kind, digest in whose.aliases]


def _whose(row: dict[str, Any]) -> Whose | None:
    if row["owner"] is None:
        return None
    aliases = tuple((UUID(bytes=each["subject_id"]), each["type"], each["digest"]) for each in row["aliases"])
    return Whose(UUID(bytes=row["owner"]), row["prior"], aliases)
