"""Who calls, and whether they may: bearer API keys with scopes."""

from typing import Annotated

from fastapi import Depends
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.api.context import Here
from service.domain.errors import ExpungeError
from service.store.api_keys import ApiKey, Scope

_BEARER = HTTPBearer(auto_error=False, description="An API key, `xp_...`")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]


class UnauthenticatedError(ExpungeError):
    """Send `Authorization: Bearer xp_...` with a key that is in use."""


class ForbiddenError(ExpungeError):
    """The key lacks a scope; the message names it."""


class Needs:
    """Dependency: a caller whose key has all of these scopes."""

    def __init__(self, *scopes: Scope) -> None:
        """The scopes, all of which are needed."""
        self.scopes = scopes

    # `async`, so that a remembered key costs no thread; the look-up itself runs in one.
    async def __call__(self, here: Here, credentials: Credentials) -> ApiKey:
        """The caller.

        Raises:
            UnauthenticatedError: no key, or none that is in use.
            ForbiddenError: a scope is missing.
        """
        if credentials is None:
            raise UnauthenticatedError("this call needs an API key: send `Authorization: Bearer xp_...`")
        token = credentials.credentials
        key = here.keys.peek(token) or await run_in_threadpool(here.keys.find, token)
        if key is None:
            raise UnauthenticatedError("the API key is not valid: check it, or have a new one made")
        if missing := [scope.value for scope in self.scopes if scope not in key.scopes]:
            raise ForbiddenError(f"this call needs the scope {', '.join(missing)}, which the API key lacks")
        return key


DeletionWriter = Annotated[ApiKey, Depends(Needs(Scope.DELETION_WRITE))]
DeletionReader = Annotated[ApiKey, Depends(Needs(Scope.DELETION_READ))]
DeletionApprover = Annotated[ApiKey, Depends(Needs(Scope.DELETION_APPROVE))]
Auditor = Annotated[ApiKey, Depends(Needs(Scope.DELETION_READ, Scope.AUDIT_READ))]
DataWriter = Annotated[ApiKey, Depends(Needs(Scope.DATA_WRITE))]
ModelAdmin = Annotated[ApiKey, Depends(Needs(Scope.MODEL_ADMIN))]
Caller = Annotated[ApiKey, Depends(Needs())]
