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
    ]
)


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record and the cell generation that it came with."""

    generation: int
    record: Record


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
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=SCHEMA), buffer, compression="zstd", write_statistics=False)
    return buffer.getvalue()


def decode(data: bytes) -> list[StoredRecord]:
    """The records of a payload file."""
    table = pq.read_table(io.BytesIO(data), schema=SCHEMA)
    return [StoredRecord(row["generation"], _record(row)) for row in table.to_pylist()]


def _record(row: dict[str, Any]) -> Record:
    return Record(UUID(bytes=row["record_id"]), row["salt"], row["text"], row["label"], row["image"] or b"")
