"""What signs: an Ed25519 private key, or one that lies elsewhere and is asked through securesystemslib."""

from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from service.domain.errors import UnavailableError

SCHEMES = ("hv", "file2")
"""Schemes of securesystemslib 1.6 whose signers sign Ed25519: Vault's engine Transit, and a file."""
PROBE = b"expunge: does this key sign?\n"
"""A text that is neither an envelope, nor a note, nor a handover."""


class KeyFileError(Exception):
    """A key file that cannot be used; the message says what to do. It never holds key material."""


class SignerAwayError(UnavailableError):
    """The signing key does not answer; nothing was signed, try again."""


class SigningKey(Protocol):
    """Signs; its public half is known without asking. `Ed25519PrivateKey` is one."""

    def public_key(self) -> Ed25519PublicKey:
        """The public half."""
        ...

    def sign(self, data: bytes, /) -> bytes:
        """The Ed25519 signature, 64 bytes. May be a call over the network: never inside a transaction."""
        ...


@dataclass(frozen=True, slots=True)
class HeldKey:
    """A key that a service holds. Credentials are the environment's, as its signer in securesystemslib names them."""

    uri: str
    public: Ed25519PublicKey

    def __post_init__(self) -> None:
        """Nothing is asked yet.

        Raises:
            KeyFileError: no signer of that scheme signs Ed25519.
        """
        scheme = self.uri.partition(":")[0]
        if scheme not in SCHEMES:
            raise KeyFileError(
                f"no signer {scheme!r} signs Ed25519, which tree heads need: name a key in Vault (hv:NAME/VERSION, type"
                " ed25519) or a file (file2:PATH). securesystemslib's signers for AWS, Google, Azure and PKCS #11"
                " sign ECDSA and RSA only"
            )

    def public_key(self) -> Ed25519PublicKey:
        """The public half, as it was declared."""
        return self.public

    def sign(self, data: bytes, /) -> bytes:
        """The signature, once it holds under the declared public key.

        A client is made each time: it finds a token that was renewed.

        Raises:
            SignerAwayError: the service does not answer, or does not allow it now.
            KeyFileError: it holds another key, or cannot be asked as things are.
        """
        try:
            from securesystemslib.exceptions import KeyMismatchError, UnsupportedLibraryError  # noqa: PLC0415
            from securesystemslib.signer import Signer, SSlibKey  # noqa: PLC0415
        except ModuleNotFoundError:
            raise KeyFileError("the signing key lies elsewhere: pip install 'expunge[kms]'") from None
        try:
            signer = Signer.from_priv_key_uri(self.uri, SSlibKey.from_crypto(self.public))
        except KeyMismatchError:
            raise _other(self.uri) from None
        except UnsupportedLibraryError:
            raise KeyFileError("the signing key lies elsewhere: pip install 'expunge[kms]'") from None
        except (ValueError, TypeError):
            raise KeyFileError(
                f"the signer {self.uri} cannot be used: hv:NAME/VERSION or file2:PATH name one"
            ) from None
        except Exception as error:  # noqa: BLE001 - each signer has errors of its own
            raise _away(self.uri, error) from None
        try:
            signature = bytes.fromhex(signer.sign(data).signature)
        except Exception as error:  # noqa: BLE001 - the same
            raise _away(self.uri, error) from None
        try:
            self.public.verify(signature, data)
        except InvalidSignature:
            raise _other(self.uri) from None
        return signature


def prove(key: SigningKey) -> None:
    """Do nothing where the key signs now, as the one that it is said to be.

    Raises:
        SignerAwayError: it does not answer.
        KeyFileError: it is another, or cannot be asked.
    """
    key.sign(PROBE)


def _other(uri: str) -> KeyFileError:
    return KeyFileError(
        f"the signer {uri} holds another key than the public one beside it: name its own, or its signer"
    )


def _away(uri: str, error: Exception) -> SignerAwayError:
    return SignerAwayError(
        f"the signer {uri} does not answer ({type(error).__name__}): check its address, its token and what that may do"
    )
