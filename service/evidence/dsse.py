"""DSSE 1.0.2 envelopes (secure-systems-lab/dsse): a payload, its type, Ed25519 signatures over both."""

import base64
import binascii
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.evidence.keys import keyid
from service.evidence.signers import SigningKey


class EnvelopeError(ValueError):
    """Not an envelope that this key signed."""


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding: "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body, what is signed."""
    name = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(name), name, len(payload), payload)


def sign(payload: bytes, payload_type: str, key: SigningKey) -> dict[str, Any]:
    """The envelope, JSON-able. Ed25519 is deterministic: the same payload gives the same envelope."""
    signature = key.sign(pae(payload_type, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": payload_type,
        "signatures": [{"keyid": keyid(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(envelope: dict[str, Any], payload_type: str, key: Ed25519PublicKey) -> bytes:
    """The payload, once one of the signatures holds under `key`; `keyid` is a hint and decides nothing.

    Raises:
        EnvelopeError: not of this form or type, or not signed by the key.
    """
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [base64.b64decode(entry["sig"], validate=True) for entry in envelope["signatures"]]
        found_type: str = envelope["payloadType"]
    except (KeyError, TypeError, binascii.Error, ValueError):
        raise EnvelopeError("not a DSSE envelope with payload, payloadType and signatures") from None
    if found_type != payload_type:
        raise EnvelopeError(f"the payload is of another type than {payload_type}")
    for signature in signatures:
        try:
            key.verify(signature, pae(payload_type, payload))
        except InvalidSignature:
            continue
        return payload
    raise EnvelopeError("no signature holds under this key: take the key of the operator that issued the envelope")
