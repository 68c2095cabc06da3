"""Who calls, and whether they may: bearer API keys with scopes."""

from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer

from service.api.context import get_context
from service.domain.errors import ExpungeError
from service.store.api_keys import ApiKey, Scope


class UnauthenticatedError(ExpungeError):
    """Send `Authorization: Bearer xp_...` with a key that is in use."""


class ForbiddenError(ExpungeError):
    """The key lacks a scope; the message names it."""


class Needs(HTTPBearer):
    """Dependency: a caller whose key has all of these scopes.

    It is the security scheme itself, so that FastAPI has one dependency to solve a call, not four.
    """

    def __init__(self, *scopes: Scope) -> None:
        """The scopes, all of which are needed."""
        super().__init__(scheme_name="API key", description="An API key, `xp_...`", auto_error=False)
        self.scopes = scopes

    # `async`, so that a remembered key costs no thread; the look-up itself runs in one.
    async def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - ours gives the caller
        self, request: Request
    ) -> ApiKey:
        """The caller.

        Raises:
            UnauthenticatedError: no key, or none that is in use.
            ForbiddenError: a scope is missing.
        """
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise UnauthenticatedError("this call needs an API key: send `Authorization: Bearer xp_...`")
        keys = (await get_context(request)).keys
        key = keys.peek(token) or await run_in_threadpool(keys.find, token)
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
