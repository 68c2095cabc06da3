"""Records and cell manifests: what a stage was trained on, committed to without saying who."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from uuid import UUID

from shards.digest import canonical, keyed, sha256_hex
from shards.errors import ManifestMismatchError
from shards.merkle import root


@dataclass(frozen=True, slots=True)
class Record:
    """One training example as it lies in a cell's payload file."""

    record_id: UUID
    salt: bytes
    """32 random bytes, kept beside the payload only and destroyed with it."""
    text: str
    label: str
    """A class, a number in decimal digits, or the answer to a prompt: as the recipe's task reads it."""
    image: bytes = b""
    """The bytes of an image file, where the input is one."""

    @property
    def content_digest(self) -> bytes:
        """HMAC-SHA256 of the payload under the salt: without the salt even a short text cannot be guessed (rule 25)."""
        body = {"label": self.label, "text": self.text}
        if self.image:
            body["image"] = sha256_hex(self.image)
        return keyed(self.salt, canonical(body))

    @property
    def commitment(self) -> bytes:
        """32 bytes that stand for the record in manifests."""
        return commitment_of(self.record_id, self.content_digest)


def commitment_of(record_id: UUID, content_digest: bytes) -> bytes:
    """Commitment to one record: SHA-256 over a tag, its id and its salted content digest."""
    return bytes.fromhex(sha256_hex(b"expunge record v1\x00" + record_id.bytes + content_digest))


@dataclass(frozen=True)
class Manifest:
    """The sorted record commitments of a cell at one moment."""

    commitments: tuple[bytes, ...]

    @classmethod
    def of(cls, commitments: Iterable[bytes]) -> "Manifest":
        """Manifest of a cell's commitments, in any order."""
        return cls(tuple(sorted(commitments)))

    @cached_property
    def root(self) -> str:
        """Merkle root (RFC 6962) as hex: the manifest's name."""
        return root(self.commitments).hex()


def check_records(records: Iterable[Record], expected_root: str) -> None:
    """Refuse records that are not exactly those of the manifest; what is hashed is what is trained on (design.md 2.4).

    Raises:
        ManifestMismatchError: more, fewer or other records than the manifest's.
    """
    found = Manifest.of(record.commitment for record in records).root
    if found != expected_root:
        raise ManifestMismatchError(
            f"the records at hand have manifest {found[:12]}, the stage was planned on {expected_root[:12]}: "
            "the cell changed or its file is damaged; plan the stage again on today's manifests"
        )
