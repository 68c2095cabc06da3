"""A model check of the serving protocol (protocol.md, section 2): every interleaving, by breadth-first search.

The world is a database, a barrier and one or two processes, each with the *real* `Fence`. A process may stop between
any two steps for any time, messages are delayed, reordered or lost, and clocks drift by what assumption A1 allows.
Version 1 is tainted, version 2 deactivates it, version 3 is a rebuild. The full rule set holds; each rule that
protocol.md names as needed is taken away in turn, and the search must then find a violation.

Time is discrete and relative: a fence's `lease_until` is what is left of its lease, and `now` is always 0.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest

from service.serving.fence import Fence

TTL = 2
MARGIN = 1
"""Ticks that a process's clock may lose within one TTL."""


class Beat(NamedTuple):
    """A registration or heartbeat on its way."""

    stage: str
    """`sent`, then (where read and write are not under one lock) `read`, then `granted`."""
    registers: bool
    covers: int
    floor: int
    """What the transaction read, in stage `read`."""
    age: int
    """Ticks of the process's clock since before it was sent."""
    slow: bool
    """Whether that clock lost its tick since."""


class Process(NamedTuple):
    """One process and what it has on its way."""

    phase: str
    """`off`, `loaded`, `serving`."""
    fence: Fence
    slow: bool
    """Whether the clock lost its tick since the lease's heartbeat was sent."""
    beats: tuple[Beat, ...] = ()


class World(NamedTuple):
    """Everything."""

    version: int
    floor: int
    cleared: int
    timer: int | None
    """Ticks until the barrier may declare floor 2 without acknowledgements; None before it has read that floor."""
    rows: tuple[tuple[int, bool] | None, ...]
    """Lease rows: (covers, ended)."""
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Rules:
    """The protocol; a mutant lacks one of them."""

    expiry_from_before_sending: bool = True
    check_after_computing: bool = True
    refuse_below_floor: bool = True
    one_lock: bool = True
    registration_checks_floor: bool = True
    row_per_process: bool = True
    ack_when_old_work_cannot_pass: bool = True
    sending_counts: bool = True
    rebuild_checks_taint: bool = True
    margin: bool = True
    leases: bool = True
    # Not rules, but the size of the search:
    beats: int = 2
    rebuild: bool = True


class Violation(Exception):  # noqa: N818
    """A tainted answer after `deactivated`; the argument is which promise broke."""


def start(processes: int) -> World:
    """The second process, if any, is a successor: the first one serves version 1 already."""
    fence = Fence(lease_until=0)
    if processes == 2:
        serving = Process("serving", fence.advance(1, 1).grant(0, TTL), slow=False)
        return World(1, 1, 1, None, ((1, False), None), (serving, Process("off", fence, slow=False)))
    return World(1, 1, 1, None, (None,) * processes, (Process("off", fence, slow=False),) * processes)


def tainted(version: int, rules: Rules) -> bool:
    return version == 1 or (version == 3 and not rules.rebuild_checks_taint)


def steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Every next state. Raises Violation at a step that breaks P2 or P3."""
    if world.version == 1:
        yield "publish the deactivation", world._replace(version=2, floor=2)
    if world.version == 2 and rules.rebuild:
        yield "publish the rebuild", world._replace(version=3)
    yield from barrier_steps(world, rules)
    yield from ticks(world)
    for place, process in enumerate(world.processes):
        for label, after, changed in process_steps(world, place, process, rules):
            moved = (*changed.processes[:place], after, *changed.processes[place + 1 :])
            yield f"P{place} {label}", changed._replace(processes=moved)


def barrier_steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    if world.floor < 2 or world.cleared == 2:
        return
    if world.timer is None:
        yield "barrier reads floor 2", world._replace(timer=TTL + (MARGIN if rules.margin else 0))
    lagging = [row is not None and not row[1] and row[0] < 2 for row in world.rows]
    if world.timer == 0 or (world.timer is not None and not any(lagging)):
        rows = tuple((row[0], True) if row and late else row for row, late in zip(world.rows, lagging, strict=True))
        yield "deactivated", world._replace(cleared=2, rows=rows)


def ticks(world: World) -> Iterator[tuple[str, World]]:
    """A tick passes; each process's clock may miss it, but not twice while anything it timed is still open."""
    passed = world._replace(timer=max(0, world.timer - 1) if world.timer is not None else None)
    worlds = [passed._replace(processes=())]
    for process in world.processes:
        on_time = process._replace(
            fence=replace(process.fence, lease_until=max(0, process.fence.lease_until - 1)),
            beats=tuple(sorted({beat._replace(age=min(TTL, beat.age + 1)) for beat in process.beats})),
        )
        choices = [on_time]
        timed = process.beats or process.fence.lease_until > 0
        lost_before = any(beat.slow for beat in process.beats) or (process.slow and process.fence.lease_until > 0)
        if timed and not lost_before:
            late = tuple(beat._replace(slow=True) for beat in process.beats)
            choices.append(process._replace(slow=process.fence.lease_until > 0, beats=late))
        worlds = [w._replace(processes=(*w.processes, choice)) for w in worlds for choice in choices]
    yield from (("tick", after) for after in worlds)


def process_steps(world: World, place: int, process: Process, rules: Rules) -> Iterator[tuple[str, Process, World]]:
    fence = process.fence
    if process.phase == "off":
        yield "loads", process._replace(phase="loaded", fence=fence.advance(world.version, world.floor)), world
        return
    yield from answer_steps(world, place, process, rules)
    for loaded in (world.version, 0):  # the new version, or its artefact is damaged
        floor = world.floor if rules.ack_when_old_work_cannot_pass else 0
        yield f"follows with {loaded}", process._replace(fence=fence.advance(loaded, floor)), world
    registers = process.phase == "loaded"
    if len(process.beats) < (1 if registers else rules.beats):
        beat = Beat("sent", registers, covers(fence, rules), 0, 0, slow=False)
        yield "sends a heartbeat", process._replace(beats=tuple(sorted({*process.beats, beat}))), world
    for beat in process.beats:
        rest = process._replace(beats=tuple(other for other in process.beats if other is not beat))
        yield "message lost", rest, world
        yield from beat_steps(world, place, rest, beat, rules)


def covers(fence: Fence, rules: Rules) -> int:
    if not rules.ack_when_old_work_cannot_pass:
        return fence.pointer
    return fence.covers if rules.sending_counts else replace(fence, sending=()).covers


def answer_steps(world: World, place: int, process: Process, rules: Rules) -> Iterator[tuple[str, Process, World]]:
    """One request at a time: begin, final check, write."""
    fence = process.fence
    for version, _ in fence.computing:
        allowed = fence.may_answer(version, 0 if rules.leases else float("-inf"))
        if allowed or not rules.check_after_computing:
            if world.cleared == 2 and tainted(version, rules):
                raise Violation("P2: a final check passed")
            yield f"checks {version}", process._replace(fence=fence.send(version)), world
        else:
            yield f"abandons {version}", process._replace(fence=fence.abandon(version)), world
    for version, _ in fence.sending:
        row = world.rows[place if rules.row_per_process else 0]
        if world.cleared == 2 and tainted(version, rules) and row is not None and not row[1]:
            raise Violation("P3: an acknowledged process wrote")
        yield f"writes {version}", process._replace(fence=fence.sent(version)), world
    # A check before computing is hygiene, so it is left out; without the check after, it is the only one.
    may_begin = rules.check_after_computing or fence.may_answer(fence.pointer, 0)
    if fence.pointer and not fence.computing and not fence.sending and may_begin:
        yield f"begins on {fence.pointer}", process._replace(fence=fence.begin()), world


def beat_steps(
    world: World, place: int, rest: Process, beat: Beat, rules: Rules
) -> Iterator[tuple[str, Process, World]]:
    """What becomes of a message: the transaction, then the reply."""
    if beat.stage == "granted":
        age = beat.age if rules.expiry_from_before_sending else 0
        fence = rest.fence.grant(-age, TTL)
        fresh = fence.lease_until > rest.fence.lease_until
        slow = beat.slow if fresh else rest.slow
        yield "is granted", rest._replace(phase="serving", fence=fence, slow=slow), world
        return
    if beat.stage == "sent" and not rules.one_lock:
        read = beat._replace(stage="read", floor=world.floor)
        yield "transaction reads", rest._replace(beats=tuple(sorted({*rest.beats, read}))), world
        return
    key = place if rules.row_per_process else 0
    row, floor = world.rows[key], (world.floor if rules.one_lock else beat.floor)
    checked = rules.registration_checks_floor if beat.registers else rules.refuse_below_floor
    if checked and beat.covers < floor:
        yield "is refused", rest, world
    elif beat.registers or (row is not None and not row[1]):
        before = row[0] if row is not None and not beat.registers else 0
        rows = (*world.rows[:key], (max(before, beat.covers), False), *world.rows[key + 1 :])
        granted = beat._replace(stage="granted", floor=0)
        yield (
            "transaction commits",
            rest._replace(beats=tuple(sorted({*rest.beats, granted}))),
            world._replace(rows=rows),
        )
    else:
        yield "is refused as ended", rest, world


def search(rules: Rules, *, processes: int, limit: int = 10**7) -> tuple[int, list[str] | None]:
    """Number of states, and the shortest way to a violation or None."""
    first = start(processes)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        try:
            for label, after in steps(world, rules):
                if after not in came_from:
                    if len(came_from) == limit:
                        return limit, None
                    came_from[after] = (world, label)
                    queue.append(after)
        except Violation as violation:
            trace = [str(violation)]
            while (link := came_from[world]) is not None:
                world, label = link
                trace.append(label)
            return len(came_from), trace[::-1]
    return len(came_from), None


def test_the_full_rule_set_holds_for_one_process() -> None:
    states, trace = search(Rules(beats=1), processes=1)
    assert trace is None, trace
    assert states > 10_000


def test_the_full_rule_set_holds_for_a_process_and_its_successor_nearby() -> None:
    states, trace = search(Rules(beats=1, rebuild=False), processes=2, limit=40_000)
    assert trace is None, trace
    assert states == 40_000  # bounded, breadth first; a slow test goes further


@pytest.mark.slow
def test_the_full_rule_set_holds_with_two_heartbeats_under_way() -> None:
    states, trace = search(Rules(), processes=1)
    assert trace is None, trace
    assert states > 100_000


@pytest.mark.slow
def test_the_full_rule_set_holds_for_a_process_and_its_successor_further_out() -> None:
    _, trace = search(Rules(beats=1, rebuild=False), processes=2, limit=500_000)
    assert trace is None, trace


MUTANTS = {
    "expiry_from_before_sending": 1,
    "check_after_computing": 1,
    "refuse_below_floor": 1,
    "one_lock": 1,
    "registration_checks_floor": 1,
    "row_per_process": 2,
    "ack_when_old_work_cannot_pass": 1,
    "sending_counts": 1,
    "rebuild_checks_taint": 1,
    "margin": 1,
    "leases": 1,
}


@pytest.mark.parametrize(("rule", "processes"), MUTANTS.items())
def test_no_rule_can_be_left_out(rule: str, processes: int) -> None:
    mutant = replace(Rules(beats=1, rebuild=rule == "rebuild_checks_taint"), **{rule: False})
    states, trace = search(mutant, processes=processes, limit=200_000)
    assert trace is not None, f"no violation in {states} states without {rule}"
    assert "deactivated" in trace
