"""States of a deletion request and of its target per model: one enum, one table of transitions."""

from enum import StrEnum

from service.domain.errors import ConflictError


class Kind(StrEnum):
    """What the subject asked for."""

    ERASE = "erase"
    RESTRICT = "restrict"
    OBJECT = "object"


class State(StrEnum):
    """Where a target stands; a request shows its least advanced target's."""

    RECEIVED = "received"
    """Durably logged; no replica knows yet."""
    AWAITING_IDENTITY = "awaiting_identity"
    AWAITING_APPROVAL = "awaiting_approval"
    DEACTIVATING = "deactivating"
    """The floor is raised; replicas are moving."""
    DEACTIVATED = "deactivated"
    """No replica can begin an answer from a tainted stage."""
    ERASING = "erasing"
    """Payloads and tainted artefacts are being destroyed; no way back."""
    COMPLETED = "completed"
    REJECTED = "rejected"
    REVOKED = "revoked"
    EXPIRED = "expired"
    DUPLICATE = "duplicate"
    LIFTED = "lifted"
    FAILED = "failed"
    """Needs an operator; visible and retryable, never final by itself."""


class Outcome(StrEnum):
    """How a completed target ended."""

    ERASED = "erased"
    RESTRICTED = "restricted"
    NO_MATCH = "no_match"
    PARTIAL = "partial"


class Regime(StrEnum):
    """The law that sets the due date."""

    GDPR = "gdpr"
    CCPA = "ccpa"
    VOLUNTARY = "voluntary"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.RECEIVED: frozenset(
        {
            State.AWAITING_IDENTITY,
            State.AWAITING_APPROVAL,
            State.DEACTIVATING,
            State.COMPLETED,  # no_match
            State.REJECTED,
            State.REVOKED,
            State.DUPLICATE,
            State.FAILED,
        }
    ),
    State.AWAITING_IDENTITY: frozenset({State.RECEIVED, State.REJECTED, State.REVOKED, State.EXPIRED}),
    State.AWAITING_APPROVAL: frozenset({State.RECEIVED, State.REJECTED, State.REVOKED, State.EXPIRED}),
    State.DEACTIVATING: frozenset({State.DEACTIVATED, State.FAILED}),
    State.DEACTIVATED: frozenset({State.ERASING, State.COMPLETED, State.LIFTED, State.REVOKED, State.FAILED}),
    State.ERASING: frozenset({State.COMPLETED, State.FAILED}),
    State.COMPLETED: frozenset(
        {
            State.LIFTED,  # a restriction that is lifted
            State.REVOKED,  # no_match, beside targets of a revoked erasure that did match
        }
    ),
    State.DUPLICATE: frozenset({State.RECEIVED}),  # its canonical request was withdrawn (rule 29)
    State.FAILED: frozenset({State.RECEIVED, State.DEACTIVATING, State.DEACTIVATED, State.ERASING}),  # retry
    State.REJECTED: frozenset(),
    State.REVOKED: frozenset(),
    State.EXPIRED: frozenset(),
    State.LIFTED: frozenset(),
}

ADVANCE: tuple[State, ...] = (
    State.FAILED,
    State.AWAITING_IDENTITY,
    State.AWAITING_APPROVAL,
    State.RECEIVED,
    State.DEACTIVATING,
    State.DEACTIVATED,
    State.ERASING,
    State.COMPLETED,
    State.LIFTED,
    State.REVOKED,
    State.REJECTED,
    State.EXPIRED,
    State.DUPLICATE,
)
"""Least advanced first; `failed` shows when any target is (rule 26)."""


def check_transition(old: State, new: State) -> None:
    """Refuse a step that the table does not have.

    Raises:
        ConflictError: naming both states.
    """
    if new not in TRANSITIONS[old]:
        raise ConflictError(f"a target cannot go from {old} to {new}")


def least_advanced(states: list[State]) -> State:
    """The state that a request shows, given its targets' states (at least one)."""
    return min(states, key=ADVANCE.index)


def joint_outcome(outcomes: list[Outcome]) -> Outcome:
    """The outcome of a completed request: the targets' when they agree, leaving `no_match` aside; else partial."""
    found = {outcome for outcome in outcomes if outcome is not Outcome.NO_MATCH}
    if not found:
        return Outcome.NO_MATCH
    return found.pop() if len(found) == 1 else Outcome.PARTIAL
