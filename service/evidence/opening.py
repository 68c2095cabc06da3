"""Opening a certificate or supplement: DSSE envelope, signature, canonical JSON, closed form; each step may refuse."""

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from service.evidence.form import CERTIFICATE, OFFLINE, REPLACED, SHAPES
from service.evidence.shape import misfit
from shards.digest import canonical, sha256_hex

PAYLOAD_TYPE = "application/vnd.in-toto+json"


class Refused(Exception):  # noqa: N818 - a finding, not a fault of the program
    """A check that does not hold, and why."""


@dataclass(frozen=True, slots=True)
class Trusted:
    """A key of the operator's (PEM), and the tree heads that it signed: of more than `since` leaves up to `until`."""

    pem: bytes
    since: int = -1
    until: int | None = None
    """None: it signs today."""


@dataclass(frozen=True, slots=True)
class Key:
    """A trusted key, read."""

    public: Ed25519PublicKey
    since: int = -1
    until: int | None = None

    def signs(self, size: int) -> bool:
        """Whether a tree head of that size may be its own: a key that was stolen after its time signs nothing new."""
        return size > self.since and (self.until is None or size <= self.until)


@dataclass(slots=True)
class Case:
    """A document while it is opened: each step leaves what the next may use."""

    envelope: Any
    trusted: Sequence[Trusted]
    """A document holds if one of them signed it: keys are rotated, and old documents stay valid."""
    kind: str = CERTIFICATE
    payload: bytes = b""
    signatures: list[bytes] = field(default_factory=list[bytes])
    keys: list[Key] = field(default_factory=list[Key])
    statement: Any = None

    @property
    def said(self) -> dict[str, Any]:
        """The predicate."""
        return self.statement["predicate"]


def require(condition: Any, refusal: str) -> None:
    """Refuse with these words unless the condition holds."""
    if not condition:
        raise Refused(refusal)


def read_json(data: bytes) -> Any:
    """Parse JSON; a member given twice is refused, since readers differ in which they take.

    Raises:
        ValueError: not such JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("an object has the same member twice")
        return dict(pairs)

    try:
        return json.loads(data.decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


# DSSE 1.0.2 demands that unknown members of the envelope are ignored; nothing outside the payload counts.


def _envelope(case: Case) -> str:
    try:
        case.payload = _base64(case.envelope["payload"])
        case.signatures = [_base64(entry["sig"]) for entry in case.envelope["signatures"]]
        require(isinstance(case.envelope["payloadType"], str), "payloadType is not a text")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("not a DSSE envelope with payload, payloadType and signatures in base64") from None
    return f"DSSE with {len(case.payload)} bytes and {len(case.signatures)} signature(s)"


def _base64(text: str) -> bytes:
    return base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)


def _payload_type(case: Case) -> str:
    require(case.envelope["payloadType"] == PAYLOAD_TYPE, f"the payload's type is not {PAYLOAD_TYPE}")
    return PAYLOAD_TYPE


def _signature(case: Case) -> str:
    case.keys = [Key(_public(each.pem), each.since, each.until) for each in case.trusted]
    kind = case.envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(case.payload), case.payload)
    for key in case.keys:
        for signature in case.signatures:
            try:
                key.public.verify(signature, signed)
            except InvalidSignature:
                continue
            der = key.public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return f"Ed25519 key {sha256_hex(der)}"
    raise Refused(
        "no signature holds under the key given: the file was changed, or another installation or key signed it"
    )


def _public(pem: bytes) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise Refused("the key given is not a public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Refused("the key given is not an Ed25519 key")
    return key


def _canonical(case: Case) -> str:
    try:
        statement = read_json(case.payload)
        same = canonical(statement) == case.payload
    except (ValueError, RecursionError) as error:
        raise Refused(f"the payload is not canonical JSON: {error}") from None
    require(same, "the payload is JSON, but not in its canonical form (RFC 8785)")
    case.statement = statement
    return "RFC 8785"


def _shape(case: Case) -> str:
    found = case.statement.get("predicateType") if isinstance(case.statement, dict) else None
    require(
        not (isinstance(found, str) and REPLACED.fullmatch(found)),
        "a certificate of version 1, which was never released: ask the operator for one of version 2",
    )
    problem = misfit(case.statement, SHAPES[case.kind])
    require(problem is None, str(problem))
    return "every member known, none missing"


Step = tuple[str, str, Callable[[Case], str]]
OPENING: tuple[Step, ...] = (
    ("envelope", OFFLINE, _envelope),
    ("payload type", OFFLINE, _payload_type),
    ("signature", OFFLINE, _signature),
    ("canonical payload", OFFLINE, _canonical),
    ("closed schema", OFFLINE, _shape),
)
