from itertools import pairwise, product

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


def reachable(start: State, without: State | None = None) -> set[State]:
    """States on any way from `start`, itself included, that does not enter `without`."""
    seen: set[State] = set()
    waiting = [start]
    while waiting:
        state = waiting.pop()
        if state not in seen and state is not without:
            seen.add(state)
            waiting.extend(TRANSITIONS[state])
    return seen


def test_the_table_is_total_and_closed() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(following <= set(State) for following in TRANSITIONS.values())
    assert all(state not in following for state, following in TRANSITIONS.items())


def test_every_state_can_be_reached_and_left_unless_final() -> None:
    assert reachable(State.RECEIVED) == set(State)
    assert {state for state, following in TRANSITIONS.items() if not following} == FINAL
    for state in State:
        assert reachable(state) & (FINAL | {State.COMPLETED}), state


def test_nothing_is_erased_that_was_not_deactivated() -> None:
    """Only the retry of a failed target comes from elsewhere; it goes back to where it failed."""
    before = {state for state in State if State.ERASING in TRANSITIONS[state]}
    assert before == {State.DEACTIVATED, State.FAILED}
    assert {state for state in State if State.DEACTIVATED in TRANSITIONS[state]} == {
        State.DEACTIVATING,
        State.FAILED,
    }


def test_there_is_no_way_back_from_erasing() -> None:
    assert TRANSITIONS[State.ERASING] == {State.COMPLETED, State.FAILED}
    undone = {State.REVOKED, State.LIFTED, State.REJECTED}
    assert not TRANSITIONS[State.ERASING] & undone
    assert not TRANSITIONS[State.DEACTIVATING] & undone  # rule 28: a revoke that finds it gets 409


def test_a_failed_target_can_be_retried_from_each_working_state() -> None:
    working = {State.RECEIVED, State.DEACTIVATING, State.DEACTIVATED, State.ERASING}
    assert TRANSITIONS[State.FAILED] == working
    assert {state for state in State if State.FAILED in TRANSITIONS[state]} == working


def test_an_unanswered_identity_check_can_only_resume_or_end() -> None:
    for state in (State.AWAITING_IDENTITY, State.AWAITING_APPROVAL):
        assert reachable(state, without=State.RECEIVED) - {state} == FINAL - {State.LIFTED}


@pytest.mark.parametrize(("old", "new"), list(product(State, State)))
def test_check_transition_is_the_table(old: State, new: State) -> None:
    if new in TRANSITIONS[old]:
        check_transition(old, new)
        return
    with pytest.raises(ConflictError, match=f"from {old} to {new}"):
        check_transition(old, new)


def test_every_state_has_one_place_in_the_order() -> None:
    assert sorted(ADVANCE) == sorted(State)


@given(st.lists(st.sampled_from(State), min_size=1))
def test_least_advanced(states: list[State]) -> None:
    shown = least_advanced(states)
    assert shown in states
    assert least_advanced(states[::-1]) is shown
    assert (shown is State.FAILED) == (State.FAILED in states)
    if shown is State.COMPLETED:
        assert not {State.RECEIVED, State.DEACTIVATING, State.DEACTIVATED, State.ERASING} & set(states)


def test_progress_never_lowers_what_a_request_shows() -> None:
    course = [State.RECEIVED, State.DEACTIVATING, State.DEACTIVATED, State.ERASING, State.COMPLETED]
    for old, new in pairwise(course):
        check_transition(old, new)
        assert least_advanced([old, new]) is old


@given(st.lists(st.sampled_from(Outcome)))
def test_joint_outcome(outcomes: list[Outcome]) -> None:
    joint = joint_outcome(outcomes)
    assert joint is joint_outcome(outcomes[::-1])
    matched = {outcome for outcome in outcomes if outcome is not Outcome.NO_MATCH}
    if not matched:
        assert joint is Outcome.NO_MATCH
    elif len(matched) == 1:
        assert {joint} == matched
    else:
        assert joint is Outcome.PARTIAL


def test_the_certificate_knows_the_same_words() -> None:
    assert set(STATES) < {state.value for state in State}
    assert list(STATES[3:]) == ["deactivating", "deactivated", "erasing", "completed"]
    assert PREDICATE["request"]["kind"] == tuple(kind.value for kind in Kind)
    assert set(PREDICATE["outcome"]) < {outcome.value for outcome in Outcome}
