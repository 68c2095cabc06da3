"""The demo's records: a balanced sample of whole stand-in reviewers, the same one each time.

The reviews have no reviewer ids. Rows that share age and clothing id stand in for one reviewer, and are called
stand-in reviewers wherever they show.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from shards.digest import keyed

CLASSES = ("not recommended", "recommended")
SUBJECT_TYPE = "reviewer"
_KEY = hashlib.sha256(b"expunge demo v1").digest()
_KEEP_POSITIVE = 0.2212
"""4,101 rows with text are not recommended, 18,540 are: this share of the latter balances them."""


@dataclass(frozen=True, slots=True)
class Review:
    """One record as it is uploaded."""

    record_id: str
    reviewer: str
    """The stand-in reviewer."""
    text: str
    label: str

    def to_json(self, *, subject: bool = True) -> dict[str, Any]:
        """A line of the NDJSON upload; without its subject where `subject` is false."""
        line: dict[str, Any] = {"record_id": self.record_id, "text": self.text, "label": self.label}
        return line | {"subject": {"type": SUBJECT_TYPE, "value": self.reviewer}} if subject else line


@dataclass(frozen=True, slots=True)
class Sample:
    """Training and held-out records; no stand-in reviewer has records in both."""

    training: tuple[Review, ...]
    held_out: tuple[Review, ...]

    @property
    def reviewers(self) -> int:
        """How many stand-in reviewers the training records have."""
        return len({review.reviewer for review in self.training})

    @property
    def chosen(self) -> str:
        """The stand-in reviewer whose deletion is shown: the one with most training records, by name in a tie."""
        counts = Counter(review.reviewer for review in self.training)
        return min(counts, key=lambda reviewer: (-counts[reviewer], reviewer))

    def of(self, reviewer: str) -> tuple[Review, ...]:
        """A stand-in reviewer's training records."""
        return tuple(review for review in self.training if review.reviewer == reviewer)


def read(path: Path) -> list[Review]:
    """All reviews that have a text, thinned to about as many recommended as not.

    Whether a record stays is decided by the record alone, before any reviewer or split is looked at: no record's
    presence depends on another (design.md 2.2).
    """
    columns = ["__index_level_0__", "Age", "Clothing ID", "Title", "Review Text", "Recommended IND"]
    rows = pq.read_table(path, columns=columns).to_pylist()
    return [review for review in map(_review, rows) if review is not None and _kept(review)]


def draw(reviews: Iterable[Review], *, training: int, held_out: int) -> Sample:
    """Whole stand-in reviewers in the order of a keyed hash, until each part has at least as many records as asked."""
    groups: defaultdict[str, list[Review]] = defaultdict(list)
    for review in reviews:
        groups[review.reviewer].append(review)
    parts: tuple[list[Review], list[Review]] = ([], [])
    wanted = (training, held_out)
    part = 0
    for reviewer in sorted(groups, key=lambda name: keyed(_KEY, b"reviewer", name.encode())):
        while part < 2 and len(parts[part]) >= wanted[part]:
            part += 1
        if part == 2:
            break
        parts[part].extend(groups[reviewer])
    if any(len(found) < size for found, size in zip(parts, wanted, strict=True)):
        raise ValueError(f"{training} + {held_out} records are more than the reviews have")
    return Sample(*map(tuple, parts))


def _review(row: dict[str, Any]) -> Review | None:
    if not row["Review Text"]:
        return None
    return Review(
        record_id=f"review-{row['__index_level_0__']:05d}",
        reviewer=f"age-{row['Age']}-clothing-{row['Clothing ID']}",
        text=f"{row['Title']}. {row['Review Text']}" if row["Title"] else row["Review Text"],
        label=CLASSES[row["Recommended IND"]],
    )


def _kept(review: Review) -> bool:
    if review.label == CLASSES[0]:
        return True
    place = int.from_bytes(keyed(_KEY, b"thin", review.record_id.encode())[:8], "big")
    return place < _KEEP_POSITIVE * 2**64
