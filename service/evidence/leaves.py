"""Leaves of the ledger and what opens them.

A leaf says when something of a kind happened and commits to the rest; the opening holds the rest and a salt. Without
its opening a leaf says nothing about a person, so openings can be erased and the tree stays whole.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import rfc8785

from shards.digest import canonical, sha256_hex

LEAF = re.compile(
    rb'\{"commitment":"([0-9a-f]{64})","event_id":"([0-9a-f-]{36})",'
    rb'"index":(0|[1-9][0-9]{0,18}),"kind":"([a-z_.]+)",'
    rb'"time":"([0-9-]{10}T[0-9:]{8}\.[0-9]{6}Z)","type":"expunge leaf v1"\}'
)
"""The one form of a leaf: canonical JSON (RFC 8785). As simple as it can be: a check matches millions."""
SALT_BYTES = 32


class Recorded(Protocol):
    """An event as it was recorded."""

    @property
    def event_id(self) -> UUID: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def request_id(self) -> UUID | str | None: ...  # noqa: D102
    @property
    def model_id(self) -> int | None: ...  # noqa: D102
    @property
    def body(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def created_at(self) -> datetime: ...  # noqa: D102


class Sealed(NamedTuple):
    """An event at its place in the ledger."""

    place: int
    event_id: UUID
    at: datetime
    leaf: bytes
    opening: bytes


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a leaf says by itself."""

    index: int
    event_id: str
    kind: str
    time: str
    commitment: str


def seal(events: Sequence[Recorded], first: int) -> Iterator[Sealed]:
    """The events as leaves `first`, `first` + 1, ..., each under a fresh salt, made as they are asked for."""
    salts = secrets.token_hex(SALT_BYTES * len(events))
    for place, event in enumerate(events):
        at = place * 2 * SALT_BYTES
        opening = make_opening(event, salts[at : at + 2 * SALT_BYTES])
        leaf = (
            f'{{"commitment":"{sha256(opening).hexdigest()}","event_id":"{event.event_id}","index":{first + place},'
            f'"kind":"{event.kind}","time":"{moment(event.created_at)}","type":"expunge leaf v1"}}'
        )
        yield Sealed(first + place, event.event_id, event.created_at, leaf.encode(), opening)


def make_opening(event: Recorded, salt: str) -> bytes:
    """Canonical JSON of what a leaf commits to; the commitment is its SHA-256."""
    value = {
        "type": "expunge opening v1",
        "salt": salt,
        "event_id": str(event.event_id),
        "request_id": str(event.request_id) if event.request_id else None,
        "model_id": event.model_id,
        "body": event.body,
    }
    try:
        return canonical(value)
    except (rfc8785.CanonicalizationError, RecursionError):
        # RFC 8785 has no integers past 2**53; nothing that was recorded may keep what follows it out of the ledger.
        return canonical({**value, "body": {"not_canonical": json.dumps(event.body, sort_keys=True)}})


def parse_leaf(data: bytes) -> Leaf:
    """Read a leaf.

    Raises:
        ValueError: not a leaf.
    """
    found = LEAF.fullmatch(data)
    if found is None:
        raise ValueError("not a leaf of the ledger")
    commitment, event_id, index, kind, time = (part.decode() for part in found.groups())
    return Leaf(int(index), event_id, kind, time, commitment)


def open_leaf(leaf: Leaf, opening: bytes) -> Mapping[str, Any]:
    """What the leaf committed to: request_id, model_id and body.

    Raises:
        ValueError: the opening is not this leaf's.
    """
    if sha256_hex(opening) != leaf.commitment:
        raise ValueError(f"this does not open leaf {leaf.index}: its SHA-256 is not the leaf's commitment")
    return json.loads(opening)


def moment(when: datetime) -> str:
    """RFC 3339 in UTC with microseconds: such texts sort as the moments do."""
    return f"{when.astimezone(UTC).isoformat(timespec='microseconds')[:-6]}Z"
