"""Partition: a record's cell is a keyed hash of its owner, independent of every other record (design.md 2.1)."""

from dataclasses import dataclass
from uuid import UUID

from shards.digest import keyed


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One (shard, slice) of a dataset's grid; both count from 0."""

    shard: int
    slice: int


def dataset_key(partition_key: bytes, dataset_id: UUID) -> bytes:
    """The dataset's own partition key (32 bytes), derived from the installation's. Never rotated: data would move."""
    return keyed(partition_key, b"dataset", dataset_id.bytes)


def cell_of(key: bytes, subject_id: UUID, *, shards: int, slices: int, span: range | None = None) -> Cell:
    """The cell that all records owned by `subject_id` lie in, under the dataset's key.

    `span` are the slices of the subject's deletion prior, consecutive ones of `slices`; without it, all of them.

    Raises:
        ValueError: the span is empty or reaches outside of the slices.
    """
    among = range(slices) if span is None else span
    if not among or among.step != 1 or not 0 <= among.start < among.stop <= slices:
        raise ValueError(f"a prior's slices must be consecutive ones of 0..{slices - 1}, not {among}")
    place = int.from_bytes(keyed(key, b"cell", subject_id.bytes), "big") % (shards * len(among))
    return Cell(shard=place // len(among), slice=among[place % len(among)])


def record_id_of(key: bytes, external_id: str) -> UUID:
    """The record's id: a keyed hash of the caller's own id, which may itself name a person and is not kept."""
    return UUID(bytes=keyed(key, b"record", external_id.encode())[:16])
