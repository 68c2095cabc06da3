from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import ConflictError
from service.domain.requests import (
    ADVANCE,
    TRANSITIONS,
    Kind,
    Outcome,
    State,
    check_transition,
    joint_outcome,
    least_advanced,
)
from service.evidence.form import PREDICATE, STATES

FINAL = {State.REJECTED, State.REVOKED, State.EXPIRED, State.LIFTED}


def reachable(start: State) -> set[State]:
    seen: set[State] = set()
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if state not in seen:
            seen.add(state)
            waiting.extend(TRANSITIONS[state])
    return seen
