"""Errors that reach a caller; `service.api.errors` maps each to an RFC 9457 problem."""


class ExpungeError(Exception):
    """Base of the service's own errors. Messages hold no identifier and no caller's text."""


class NotFoundError(ExpungeError):
    """There is no such thing, or the caller may not know of it."""


class ConflictError(ExpungeError):
    """The state of things forbids it; the message names the state."""


class InvalidInputError(ExpungeError):
    """The input is well-formed JSON but not acceptable; the message says which field and why."""

    def __init__(self, message: str, *, field: str | None = None, line: int | None = None) -> None:
        """Remember where: a field's name, a line of an upload."""
        super().__init__(message)
        self.field = field
        self.line = line


class UnavailableError(ExpungeError):
    """A store does not answer; nothing was lost, try again."""
