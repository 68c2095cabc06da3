"""What calls carry: names, declarations, requests. Unknown fields are refused."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Path
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from service.domain.answers import Answers
from service.domain.requests import Kind, Regime
from service.store.subjects import TYPE_PATTERN, VALUE_LIMIT, normalise

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
REFERENCE = r"^[A-Za-z0-9._:/#-]+$"
"""A ticket number: no spaces and no @, so no room for a name or an address."""
REASON_CODE = r"^[a-z][a-z0-9_]{0,63}$"
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
NamePath = Annotated[str, Path(pattern=NAME_PATTERN)]
ReasonCode = Annotated[str, StringConstraints(pattern=REASON_CODE)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=PRINTABLE)]
ExternalId = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]


class Body(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NewPrior(Body):
    """A class of subjects who are about as likely to be deleted; how likely, the recipe says."""

    name: Name
    slices: int = Field(ge=1, le=64)
    """How many slices of each shard are theirs alone; classes take consecutive ones in the order listed."""
    expires: bool = False
    """Of subjects with a known date of deletion: those whose lines carry `expires_at`."""


class NewDataset(Body):
    """A dataset's declaration; nothing of it can change later."""

    name: Name
    shards: int = Field(ge=1, le=4096)
    slices: int = Field(ge=1, le=64)
    classes: list[Label] = Field(default=[], max_length=10_000)
    """The labels of a classification, at least two; of other tasks none."""
    task: Literal["classification", "regression", "completion"] = "classification"
    """`regression`: labels are decimal numbers. `completion`: the text is a prompt, the label its answer."""
    input: Literal["text", "image", "vector"] = "text"
    """`image`: lines carry an image file in base64. `vector`: their text is a JSON array of numbers."""
    width: int | None = Field(default=None, ge=1, le=1_000_000)
    """How many numbers each vector has."""
    deletable: bool = True
    """False: an evaluation set, whose subjects cannot be deleted from it."""
    subject_row_cap: int = Field(default=1000, ge=1, le=2**31 - 1)
    priors: list[NewPrior] = Field(default=[], max_length=64)
    """Each subject gets one of these for good with its first record; none: all subjects share all slices."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be distinct")
        if self.task == "classification" and len(self.classes) < 2:
            raise ValueError("classes must list at least two labels")
        if self.task != "classification" and self.classes:
            raise ValueError(f"classes: a {self.task} has none; leave the field out")
        if (self.input == "vector") != (self.width is not None):
            raise ValueError("width: say how many numbers a vector has; leave it out for other inputs")
        if self.task == "completion" and self.input != "text":
            raise ValueError("input: a completion is learnt from text")
        return self

    @model_validator(mode="after")
    def _priors_fill_the_slices(self) -> Self:
        if not self.priors:
            return self
        if len({prior.name for prior in self.priors}) != len(self.priors):
            raise ValueError("priors must have distinct names")
        if sum(prior.slices for prior in self.priors) != self.slices:
            raise ValueError(f"the slices of priors must add up to {self.slices}, the dataset's slices")
        if sum(prior.expires for prior in self.priors) > 1:
            raise ValueError("only one of priors can be the one that expires")
        return self


class RebuildPolicy(Body):
    """When stages that deletions took are trained again, and how many."""

    kind: Literal["now", "by_deadline", "rebuild_first", "spares", "min_depth"] = "now"
    """`now`: at once. `by_deadline`: one batch, as late as is safe before the first due date. `rebuild_first`: the
    replacement is trained before the deletion takes effect, in one swap. `spares`: one full order a shard and some
    more. `min_depth`: only when a shard serves less than that."""
    spares: int = Field(default=0, ge=0, le=64)
    """For kind `spares`: how many more orders, each with another first slice."""
    min_depth: int = Field(default=0, ge=0, le=64)
    """For kind `min_depth`: the depth that is always served; for `spares`: how deep each spare is, 0 is full depth."""


class NewModel(Body):
    """A model's declaration."""

    name: Name
    dataset: Name
    evaluation_dataset: Name | None = None
    """A dataset declared not deletable, on which every stage is measured."""
    recipe: dict[str, Any]
    erase_after_seconds: int = Field(default=0, ge=0, le=366 * 24 * 3600)
    """How long a deletion can still be revoked before payloads and weights are destroyed."""
    rebuild: RebuildPolicy = RebuildPolicy()
    min_shards: int = Field(default=1, ge=1, le=2**31 - 1)
    """With fewer live shards (engine `ridge`: cells) predictions are refused, since too few would speak."""
    answers: Answers = Answers.PROBABILITIES
    """How much answers tell: every class's probability, or the label with a rounded score (`top1`)."""


class GatePolicy(Body):
    """Bounds that a rebuilt assembly must keep on the evaluation set before it serves.

    Its score is the share of right answers; of a regression 1 - mean error / declared spread.
    """

    within: float | None = Field(default=None, ge=0, le=100)
    """How many points (hundredths) it may be below the served assembly."""
    at_least: float | None = Field(default=None, ge=-1, le=1)
    """The lowest score that may serve."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.within is None and self.at_least is None:
            raise ValueError("give within, at_least, or both; a gate of null is none")
        return self


class CanaryPolicy(Body):
    """Which share of the traffic a rebuilt assembly gets before it gets all of it."""

    share: int = Field(ge=1, le=99)
    """Per cent of the requests."""
    minutes: float | None = Field(default=None, gt=0, le=60 * 24 * 30)
    """After this time without an engine's error it gets all; null: when an operator promotes it."""


class ModelChange(Body):
    """What of a model can be changed; what is left out stays, and a gate or canary of null ends."""

    rebuild: RebuildPolicy | None = None
    min_shards: int | None = Field(default=None, ge=1, le=2**31 - 1)
    answers: Answers | None = None
    gate: GatePolicy | None = None
    canary: CanaryPolicy | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        left_out = self.rebuild is None and self.min_shards is None and self.answers is None
        if left_out and self.model_fields_set.isdisjoint({"gate", "canary"}):
            raise ValueError("give rebuild, min_shards, answers, gate or canary")
        return self


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
    """`restrict` and `object` take the records out of service until they are lifted, and erase nothing."""
    regime: Regime | None = None
    """Sets the due date; without one GDPR's month applies, the strictest."""
    received_at: AwareDatetime | None = None
    """When the subject asked, with its time zone; default now."""
    reference: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=REFERENCE)] | None = None
    """The caller's ticket number. Kept in clear: never put a name or an address here."""

    @model_validator(mode="after")
    def _acceptable(self) -> Self:
        if self.received_at is not None and not EARLIEST <= self.received_at <= datetime.now(UTC):
            raise ValueError("received_at is in the future, or before the year 2000")
        return self


class Reason(Body):
    """Why an operator decides what serves."""

    reason_code: ReasonCode
    """A code of the operator's own, recorded with the caller's key: never a name or an address."""


class Withdrawal(Reason):
    """Why a request is withdrawn, or a restriction lifted."""


class NewHold(Body):
    """A legal reason not to erase a subject's records."""

    subject: Subject
    reason_code: ReasonCode


class NewConsent(Body):
    """Somebody on the do-not-train list has consented anew."""

    subject: Subject
    reason_code: ReasonCode
    dataset: Name | None = None
    """Into which dataset; None: into every one."""
