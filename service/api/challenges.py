"""Challenge audits: stages that a witness's cosignature draws are trained again, and what came of it, with proofs."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from service.api.auth import Auditor
from service.api.context import Here
from service.api.errors import RESPONSES
from service.api.schemas import NamePath
from service.domain.errors import InvalidInputError
from service.store import challenges, models
from service.store.database import transaction

router = APIRouter(prefix="/v1/models", tags=["audit"], responses=RESPONSES)


class NewChallenge(BaseModel):
    """What draws the stages."""

    model_config = ConfigDict(extra="forbid")

    checkpoint: Annotated[str, Field(max_length=10_000, description="A checkpoint that `expunge ledger witness` made.")]
    witness: Annotated[str, Field(max_length=400, description="The witness's public key as C2SP tools write it.")]
    stages: Annotated[int, Field(ge=1, le=1000, description="How many; all where fewer serve.")] = 10


@router.post("/{name}/challenges", status_code=202)
def open_challenge(name: NamePath, body: NewChallenge, here: Here, caller: Auditor) -> dict[str, Any]:
    """Have the drawn stages trained again from nothing. One challenge of a model is open at a time."""
    try:
        with transaction(here.pool) as connection:
            challenge_id = challenges.open_challenge(
                connection,
                name,
                checkpoint=body.checkpoint,
                witness=body.witness,
                count=body.stages,
                actor=caller.prefix,
            )
    except ValueError:  # its message may quote a name of the caller's
        message = "not a checkpoint that this witness cosigned: `expunge ledger witness` makes one, and shows its key"
        raise InvalidInputError(message, field="checkpoint") from None
    link = f"/v1/models/{name}/challenges/{challenge_id}"
    return {"model": name, "challenge_id": str(challenge_id), "links": {"challenge": link}}


@router.get("/{name}/challenges")
def list_challenges(name: NamePath, here: Here, _caller: Auditor) -> dict[str, Any]:
    """The newest first."""
    with transaction(here.pool) as connection:
        found = challenges.list_challenges(connection, models.get_model(connection, name).model_id)
    return {"model": name, "challenges": found}


@router.get("/{name}/challenges/{challenge_id}")
def get_challenge(name: NamePath, challenge_id: UUID, here: Here, _caller: Auditor) -> dict[str, Any]:
    """The challenge with leaves, openings and proofs; `outcome` is null while a stage waits for its replay.

    It is checked without us: `expunge challenge verify FILE --key signing.pub --witness VKEY --checkpoint cosigned`.
    """
    with transaction(here.pool) as connection:
        return challenges.document(connection, name, challenge_id)
