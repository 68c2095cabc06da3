"""Reads an NDJSON upload of records line by line; a wrong one is named by its number, never quoted."""

import base64
import binascii
import json
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any
from uuid import UUID

from service.domain.errors import InvalidInputError
from service.store.ingest import Line
from service.store.priors import Prior
from service.store.subjects import TYPE_PATTERN, VALUE_LIMIT, Alias, alias_of, normalise
from shards import images, vectors
from shards.manifest import Record
from shards.partition import record_id_of

FIELDS = frozenset({"record_id", "subject", "also_concerns", "text", "image", "label", "prior", "expires_at"})
OPTIONAL = frozenset({"also_concerns", "prior", "expires_at", "text", "image"})
RECORD_ID_LIMIT = 256
ALSO_LIMIT = 64
_TYPE = re.compile(TYPE_PATTERN)
_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", re.ASCII)


class UploadReader:
    """Feeds on the body's chunks, in order.

    What it has read stays in memory: a temporary file would be a copy of personal data that nothing erases.
    """

    def __init__(
        self,
        *,
        dataset_key: bytes,
        pepper: bytes,
        older_peppers: Sequence[bytes] = (),
        classes: list[str],
        task: str,
        input_kind: str,
        width: int | None,
        record_limit: int,
        priors: Sequence[Prior] = (),
    ) -> None:
        """`record_limit` in bytes of one line; the whole body's limit is the middleware's."""
        self._dataset_key = dataset_key
        self._pepper = pepper
        self._older_peppers = older_peppers
        self._classes = frozenset(classes)
        self._task = task
        self._input_kind = input_kind
        self._width = width
        self._record_limit = record_limit
        self._priors = {prior.name: index for index, prior in enumerate(priors)}
        self._expiring = next((index for index, prior in enumerate(priors) if prior.expires), None)
        self._rest = bytearray()
        self._number = 0
        self._seen: dict[UUID, int] = {}
        self._lines: list[Line] = []

    def feed(self, chunk: bytes) -> None:
        """Read the lines that the chunk completes.

        Raises:
            InvalidInputError: with the number of the line that is wrong.
        """
        self._rest += chunk
        for raw in self._complete():
            self._take(raw)
        if len(self._rest) > self._record_limit:
            self._number += 1
            raise self._wrong(self._too_long())

    def finish(self) -> list[Line]:
        """The upload's lines, at least one.

        Raises:
            InvalidInputError: there is none, or the last one is wrong.
        """
        if self._rest:
            self._take(bytes(self._rest))
        if not self._lines:
            raise InvalidInputError("the upload holds no record: send one JSON object a line")
        return self._lines

    def _complete(self) -> Iterator[bytes]:
        *whole, rest = self._rest.split(b"\n")
        self._rest = rest
        yield from map(bytes, whole)

    def _take(self, raw: bytes) -> None:
        self._number += 1
        if len(raw) > self._record_limit:
            raise self._wrong(self._too_long())
        body = self._parse(raw)
        if body is not None:
            self._lines.append(self._line(body))

    def _parse(self, raw: bytes) -> dict[str, Any] | None:
        """The line's object, None for a blank line."""
        try:
            text = raw.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise self._wrong("the line is not UTF-8") from None
        if not text.strip():
            return None
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise self._wrong("the line is not valid JSON") from None
        if not isinstance(body, dict):
            raise self._wrong("the line must be a JSON object")
        if missing := sorted(FIELDS - OPTIONAL - body.keys()):
            raise self._wrong(f"the field {missing[0]} is missing", missing[0])
        if body.keys() - FIELDS:
            raise self._wrong(f"there is an unknown field; the known ones are {', '.join(sorted(FIELDS))}")
        return body

    def _line(self, body: dict[str, Any]) -> Line:
        external = self._string(body["record_id"], "record_id", limit=RECORD_ID_LIMIT)
        text, image = self._input(body)
        label = self._label(body["label"])
        also = body.get("also_concerns", [])
        if not isinstance(also, list) or len(also) > ALSO_LIMIT:
            raise self._wrong(f"also_concerns must list at most {ALSO_LIMIT} subjects", "also_concerns")
        owner = self._alias(body["subject"], "subject")
        prior = self._prior(body)
        others = tuple(self._alias(item, "also_concerns") for item in also)
        record_id = record_id_of(self._dataset_key, external)
        first = self._seen.setdefault(record_id, self._number)
        if first != self._number:
            raise self._wrong(f"record_id is the same as in line {first}", "record_id")
        return Line(self._number, Record(record_id, secrets.token_bytes(32), text, label, image), owner, others, prior)

    def _input(self, body: dict[str, Any]) -> tuple[str, bytes]:
        """The line's text, or the bytes of its image."""
        wanted, other = ("image", "text") if self._input_kind == "image" else ("text", "image")
        if wanted not in body:
            raise self._wrong(f"the field {wanted} is missing: the dataset's input is {self._input_kind}", wanted)
        if other in body:
            raise self._wrong(f"leave {other} out: the dataset's input is {self._input_kind}", other)
        given = self._string(body[wanted], wanted)
        if wanted == "text":
            if self._width is not None:
                self._check_vector(given, self._width)
            return given, b""
        try:
            image = base64.b64decode(given, validate=True)
            images.decoded(image)  # one that no engine can read would fail its stage for ever
        except binascii.Error:
            raise self._wrong("image must be the bytes of an image file in base64", "image") from None
        except images.ImageError as error:
            raise self._wrong(str(error), "image") from None
        return "", image

    def _check_vector(self, text: str, width: int) -> None:
        try:
            vectors.parsed(text, width)
        except vectors.VectorError as error:
            raise self._wrong(f"text is {error}", "text") from None

    def _label(self, value: Any) -> str:
        label = self._string(value, "label")
        if self._task == "classification" and label not in self._classes:
            raise self._wrong("label is none of the dataset's classes", "label")
        if self._task == "regression" and not _DECIMAL.fullmatch(label):
            raise self._wrong('label must be a decimal number as a string, such as "3.5"', "label")
        return label

    def _alias(self, value: Any, field: str) -> Alias:
        if not isinstance(value, dict) or value.keys() != {"type", "value"}:
            raise self._wrong(f"{field} must have the fields type and value, and no others", field)
        kind = self._string(value["type"], f"{field}.type")
        if not _TYPE.fullmatch(kind):
            raise self._wrong(f"{field}.type must match {TYPE_PATTERN}, as email or user_id", f"{field}.type")
        identifier = self._string(value["value"], f"{field}.value", limit=VALUE_LIMIT)
        if not normalise(kind, identifier):
            raise self._wrong(f"{field}.value is blank", f"{field}.value")
        return alias_of(self._pepper, kind, identifier, older=self._older_peppers)

    def _prior(self, body: dict[str, Any]) -> int | None:
        """The class that the line gives its owner. Of a date only that there is one is kept."""
        if "prior" in body and "expires_at" in body:
            raise self._wrong("prior and expires_at both name a class: leave one out", "expires_at")
        if "prior" in body:
            index = self._priors.get(self._string(body["prior"], "prior"))
            if index is None:
                raise self._wrong("prior is none of the dataset's priors: name one of them or leave it out", "prior")
            return index
        if "expires_at" not in body:
            return None
        if self._expiring is None:
            raise self._wrong("none of the dataset's priors expires: leave expires_at out", "expires_at")
        try:
            date.fromisoformat(self._string(body["expires_at"], "expires_at"))
        except ValueError:
            raise self._wrong("expires_at must be a date such as 2030-12-31", "expires_at") from None
        return self._expiring

    def _string(self, value: Any, field: str, *, limit: int | None = None) -> str:
        """A string that canonical JSON and the stores can hold."""
        if not isinstance(value, str):
            raise self._wrong(f"{field} must be a string", field)
        if not value:
            raise self._wrong(f"{field} is empty", field)
        if limit is not None and len(value) > limit:
            raise self._wrong(f"{field} is longer than {limit} characters", field)
        if "\x00" in value:
            raise self._wrong(f"{field} holds a NUL character: remove it", field)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(f"{field} holds a lone surrogate, which is no character: remove it", field) from None
        return value

    def _too_long(self) -> str:
        return f"the line is longer than {self._record_limit} bytes: shorten the text or split the record"

    def _wrong(self, why: str, field: str | None = None) -> InvalidInputError:
        return InvalidInputError(why, field=field, line=self._number)
