"""What calls carry: names, declarations, requests. Unknown fields are refused."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from fastapi import Path
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.domain.requests import Kind, Regime
from service.store.subjects import TYPE_PATTERN, VALUE_LIMIT, normalise

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
REFERENCE = r"^[A-Za-z0-9._:/#-]+$"
"""A ticket number: no spaces and no @, so no room for a name or an address."""
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
NamePath = Annotated[str, Path(pattern=NAME_PATTERN)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)]
ExternalId = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NewDataset(Body):
    """A dataset's declaration; nothing of it can change later."""

    name: Name
    shards: int = Field(ge=1, le=4096)
    slices: int = Field(ge=1, le=64)
    classes: list[Label] = Field(min_length=2, max_length=10_000)
    deletable: bool = True
    """False: an evaluation set, whose subjects cannot be deleted from it."""
    subject_row_cap: int = Field(default=1000, ge=1, le=2**31 - 1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be distinct")
        return self


class NewModel(Body):
    """A model's declaration."""

    name: Name
    dataset: Name
    evaluation_dataset: Name | None = None
    """A dataset declared not deletable, on which every stage is measured."""
    recipe: dict[str, Any]
    erase_after_seconds: int = Field(default=0, ge=0, le=366 * 24 * 3600)
    """How long a deletion can still be revoked before payloads and weights are destroyed."""


class Subject(Body):
    """How the caller names a person; only a keyed hash of it is looked up or kept."""

    type: Annotated[str, StringConstraints(pattern=TYPE_PATTERN)]
    value: str = Field(min_length=1, max_length=VALUE_LIMIT)

    @model_validator(mode="after")
    def _not_blank(self) -> Self:
        if not normalise(self.type, self.value):
            raise ValueError("value is blank")
        if "\x00" in self.value:
            raise ValueError("value holds a NUL character, which no upload can have")
        return self


class About(Body):
    """Whom or what a request is about: a subject, or records of a dataset by the caller's own ids."""

    subject: Subject | None = None
    record_ids: list[ExternalId] | None = Field(default=None, min_length=1, max_length=1000)
    dataset: Name | None = None
    """The dataset of `record_ids`."""
    models: list[Name] | None = Field(default=None, min_length=1, max_length=1000)
    """Default: every model whose dataset is deletable (with `record_ids`: every model on that dataset)."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.subject is None) == (self.record_ids is None):
            raise ValueError("give either subject or record_ids, not both")
        if (self.record_ids is None) != (self.dataset is None):
            raise ValueError("record_ids and dataset come together")
        return self

    def commitment_parts(self) -> Sequence[bytes]:
        """What the subject commitment is computed over: type and value; or no type, the dataset and the ids."""
        if self.subject is not None:
            value = normalise(self.subject.type, self.subject.value)
            return (self.subject.type.encode(), value.encode())
        ids = sorted(set(self.record_ids or ()))
        return (b"", (self.dataset or "").encode(), *(each.encode() for each in ids))


EARLIEST = datetime(2000, 1, 1, tzinfo=UTC)


class NewRequest(About):
    """A deletion request."""

    kind: Kind = Kind.ERASE
    regime: Regime | None = None
    """Sets the due date; without one GDPR's month applies, the strictest."""
    received_at: AwareDatetime | None = None
    """When the subject asked, with its time zone; default now."""
    reference: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=REFERENCE)] | None = None
    """The caller's ticket number. Kept in clear: never put a name or an address here."""

    @model_validator(mode="after")
    def _acceptable(self) -> Self:
        if self.kind is not Kind.ERASE:
            raise ValueError("only the kind erase is accepted now")
        if self.received_at is not None and not EARLIEST <= self.received_at <= datetime.now(UTC):
            raise ValueError("received_at is in the future, or before the year 2000")
        return self
