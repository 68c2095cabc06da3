"""A master key in AWS KMS, or in what speaks its protocol, under which the keys of files lie wrapped."""

from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from service.domain.errors import ExpungeError

_CONFIG = Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 3})


class WrappingError(ExpungeError):
    """The key management service does not answer, or does not allow it."""


class Kms:
    """Wraps keys under one master key. Credentials, region and endpoint come from the AWS_* environment variables."""

    def __init__(self, key_id: str) -> None:
        """`key_id`: id, ARN or alias of a symmetric key that may encrypt and decrypt; first used by the first key."""
        self._key_id = key_id
        self._client: Any = boto3.client("kms", config=_CONFIG)

    def wrap(self, name: str, key: bytes) -> bytes:
        """The key as it may lie in a file; only for the file of this name.

        Raises:
            WrappingError: the service does not do it.
        """
        answer = self._call("encrypt", name, Plaintext=key)
        return answer["CiphertextBlob"]

    def unwrap(self, name: str, wrapped: bytes) -> bytes:
        """The key again.

        Raises:
            WrappingError: the service does not do it, or this is another file's key.
        """
        answer = self._call("decrypt", name, CiphertextBlob=wrapped)
        return answer["Plaintext"]

    def _call(self, verb: str, name: str, **values: bytes) -> dict[str, Any]:
        try:
            return getattr(self._client, verb)(KeyId=self._key_id, EncryptionContext={"expunge": name}, **values)
        except (BotoCoreError, ClientError) as error:
            raise WrappingError(
                f"the key management service does not {verb} ({type(error).__name__}): check EXPUNGE_FILE_KEYS_URL,"
                " AWS_REGION and the rights of this program's role"
            ) from None
