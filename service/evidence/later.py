"""Later tree heads of the ledger that somebody else holds: the certificate's must be the beginning of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from service.evidence.course import head_of
from service.evidence.log_check import continues, open_head
from service.evidence.opening import Case, Refused, require


@dataclass(frozen=True, slots=True)
class Later:
    """A tree head, and what shows that it continues the certificate's, or is continued by it."""

    what: str
    """The file, directory or URL that it is of."""
    checkpoint: str
    path: Sequence[bytes] | None = None
    """Consistency path (RFC 6962, section 2.1.2) between the two; None where only the tree head is at hand."""
    problem: str | None = None
    """Why no path could be had from the ledger given."""


def check_later(case: Case, later: Later) -> str:
    """The two tree heads are of one ledger.

    Raises:
        Refused: they are not, or that cannot be shown.
    """
    mine = head_of(case)
    if later.problem is not None:
        raise Refused(f"{later.what}: {later.problem}")
    try:
        theirs = open_head(later.checkpoint, case.keys)
    except Refused as refusal:
        raise Refused(f"{later.what}: {refusal}") from None
    require(
        theirs.origin == mine.origin,
        f"{later.what} is of the log {theirs.origin}, and the certificate of the log {mine.origin}: another instance's",
    )
    if theirs.size == mine.size:
        require(theirs.root == mine.root, fork(mine, theirs))
        return f"{theirs} is the certificate's"
    require(later.path is not None, f"{theirs} is of another size: give --ledger, which shows whether they agree")
    old, new = sorted((mine, theirs), key=lambda head: head.size)
    require(continues(old, new, later.path or ()), fork(mine, theirs))
    return f"{new} continues {old}"


def fork(one: object, other: object) -> str:
    """How two tree heads that cannot both be true are named."""
    return f"FORK: {one} and {other} are not of one ledger: keep both, and ask the operator"
