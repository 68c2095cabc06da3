"""A model check of the serving protocol (protocol.md, section 2): every interleaving of `fence_model`'s world.

The full rule set holds; each rule that protocol.md names as needed is taken away in turn, and the search must then
find a violation. With a row per process one process never sees another: a second one can only make the barrier wait,
so what is searched whole for one process holds for any number. Two are searched for what rows have in common.
"""

from dataclasses import replace

import pytest
from fence_model import search, start, steps
from fence_model_process import Space
from fence_model_rules import MARGIN, TTL, Rules, World

WHOLE = {
    "one deactivation": Rules(),
    "a deactivation and a rebuild": Rules(publications="dr"),
    "a canary, then a deactivation": Rules(publications="rd", canary=True),
    "two deactivations": Rules(publications="dd"),
    "two heartbeats under way": Rules(beats=2),
    "silent processes are ended": Rules(silence=True),
    "Postgres crashes": Rules(silence=True, accident="crash", parts=False),
    "Postgres is restored": Rules(accident="restore"),
}


@pytest.mark.parametrize("rules", WHOLE.values(), ids=WHOLE)
def test_the_full_rule_set_holds(rules: Rules) -> None:
    states, trace = search(rules)
    assert trace is None, trace
    assert states > 5_000


def test_the_full_rule_set_holds_for_a_process_and_its_successor_nearby() -> None:
    states, trace = search(Rules(), processes=2, limit=100_000)
    assert trace is None, trace
    assert states == 100_000  # bounded, breadth first; the slow test has it whole


SLOW = {
    "a process and its successor": (2, Rules(parts=False)),
    "two heartbeats, a deactivation and a rebuild": (1, Rules(beats=2, publications="dr")),
    "a crash, and answers in parts": (1, Rules(silence=True, accident="crash")),
    "a deactivation, a canary, a deactivation": (1, Rules(publications="drd", canary=True, parts=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "rules"), SLOW.values(), ids=SLOW)
def test_the_full_rule_set_holds_in_larger_spaces(processes: int, rules: Rules) -> None:
    states, trace = search(rules, processes=processes)
    assert trace is None, trace
    assert states > 100_000


MUTANTS = {
    "expiry_from_before_sending": Rules(),
    "check_after_computing": Rules(),
    "check_every_part": Rules(),
    "refuse_below_floor": Rules(),
    "one_lock": Rules(),
    "registration_checks_floor": Rules(),
    "row_per_process": Rules(),
    "ack_when_old_work_cannot_pass": Rules(),
    "sending_counts": Rules(),
    "rebuild_checks_taint": Rules(publications="dr"),
    "margin": Rules(),
    "leases": Rules(),
    "timer_per_floor": Rules(publications="dd"),
    "timer_after_commit": Rules(),
    "distrust_after_restore": Rules(accident="restore"),
    "registration_is_durable": Rules(accident="crash"),
    "silence_anew_after_crash": Rules(accident="crash", silence=True, parts=False),
}


@pytest.mark.parametrize(("rule", "rules"), MUTANTS.items(), ids=MUTANTS)
def test_no_rule_can_be_left_out(rule: str, rules: Rules) -> None:
    mutant = replace(rules, **{rule: False})
    states, trace = search(mutant, processes=2 if rule == "row_per_process" else 1, limit=200_000)
    assert trace is not None, f"no violation in {states} states without {rule}"
    assert any(label.startswith("deactivated") for label in trace)


def test_a_fencing_token_does_not_replace_a_row_per_process() -> None:
    """A paused process answers without a heartbeat: its *row* was overwritten, and no token shows that to it."""
    _, trace = search(Rules(row_per_process=False, token=True), processes=2, limit=200_000)
    assert trace is not None


@pytest.fixture(scope="module")
def bare() -> int:
    """States without any hygiene."""
    states, trace = search(Rules(publications="dr", parts=False))
    assert trace is None, trace
    return states


HYGIENE = ("check_before_computing", "never_backwards", "token", "grant_is_checked")


@pytest.mark.parametrize("hygiene", HYGIENE)
def test_hygiene_is_not_the_proof(hygiene: str, bare: int) -> None:
    """What the protocol's table says HOLDS without: the rule set above has none of it. With it less can happen."""
    states, trace = search(replace(Rules(publications="dr", parts=False), **{hygiene: True}))
    assert trace is None
    assert states <= bare


def test_covers_need_not_count_what_computes() -> None:
    """Rule 6 asks for it, and the promises hold without: a floor that rises takes such work with it."""
    _, trace = search(Rules(publications="rd", computing_counts=False))
    assert trace is None, trace


def deaf(rules: Rules, *, ticks: int) -> tuple[World, bool]:
    """A replica that renews at every tick and never swaps, after a deactivation; whether it may be declared."""
    space = Space(rules)
    world = start(space, 1)
    renewal = ["P0 sends a heartbeat", "P0 transaction commits", "P0 is granted"]
    refused = ["P0 sends a heartbeat", "P0 is refused", None]
    first = ["P0 loads 1", *renewal, "barrier looks", "publish the deactivation", "barrier looks"]
    turn = refused if rules.refuse_below_floor else renewal
    for label in [*first, *(label for _ in range(ticks) for label in (*turn, "barrier looks", "tick"))]:
        found = dict(reversed(list(steps(world, space))))
        world = found.get(label or "", world) if label in {None, "barrier looks"} else found[label]
    return world, any(label == "deactivated 2" for label, _ in steps(world, space))


def test_a_replica_that_renews_and_never_swaps_blocks_nobody() -> None:
    """Rules 5 and 9: TTL + margin after the floor was read `deactivated` can be said, whatever replicas do."""
    assert deaf(Rules(silence=True), ticks=TTL + MARGIN)[1]
    assert not deaf(Rules(silence=True), ticks=TTL + MARGIN - 1)[1]


def test_to_wait_for_silence_alone_is_safe_and_blocks_for_ever() -> None:
    """What the protocol's table says of "kill expired rows" in place of the refusal below the floor."""
    instead = Rules(refuse_below_floor=False, timer_from_publish=False, silence=True)
    _, trace = search(instead)
    assert trace is None, trace
    before, declared = deaf(instead, ticks=5)
    after, still = deaf(instead, ticks=6)
    assert (before, declared, still) == (after, False, False)  # the same world again and again


def test_the_world_is_not_empty() -> None:
    """What should happen can: acknowledged before the timer, and served on from the new version, in parts too."""
    early, labels = explored(Rules())
    assert early
    assert {(2, "P0 checks 2"), (2, "P0 checks a part of 2"), (2, "P0 abandons 1"), (1, "P0 writes 1")} <= labels
    assert {(1, "P0 is refused"), (2, "P0 is refused as ended"), (2, "P0 message lost")} <= labels
    _, labels = explored(Rules(publications="r", canary=True))
    assert {(1, "P0 follows 2 as a canary"), (1, "P0 begins on 2"), (1, "P0 checks 1"), (1, "P0 checks 2")} <= labels


def explored(rules: Rules) -> tuple[bool, set[tuple[int, str]]]:
    """Whether an open row was there when a floor was declared before its time, and all (cleared, step)."""
    space = Space(rules)
    seen: set[World] = set()
    todo = [start(space, 1)]
    labels: set[tuple[int, str]] = set()
    early = False
    while todo:
        world = todo.pop()
        for label, after in steps(world, space):
            labels.add((world.cleared, label))
            early |= label == "deactivated 2" and bool(world.timers[0]) and world.rows[0] is not None
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return early, labels
