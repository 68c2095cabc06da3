"""The world of the model check (protocol.md, section 2): a database, a barrier, one or two processes, and their clocks.

Each process runs the *real* `Fence`. It may stop between any two steps for any time; messages are delayed, reordered
or lost; a target may be read long before it is followed; clocks drift by what assumption A1 allows; Postgres may
crash or be restored. A request is answered in one piece or in parts (a stream).

Time is discrete and relative: a fence's `lease_until` is what is left of its lease, and `now` is always 0. A process is
an index into `Space.processes`, and what it can do next is computed once for all worlds that look alike to it.
"""

from collections import deque
from collections.abc import Iterator
from itertools import product

from fence_model_process import Seen, Space
from fence_model_rules import TTL, Process, Row, Rules, Violation, World

from service.serving.fence import Fence


def start(space: Space, processes: int) -> World:
    """The second process, if any, is a successor or a further replica: the first one serves version 1 already."""
    rules, fence = space.rules, Fence(lease_until=0)
    off = space.index(Process("off", fence, slow=False))
    timers: tuple[int | None, ...] = (None,) * rules.publications.count("d")
    if processes == 1:
        return World(1, 1, timers, 0, 0, (None,), (off,))
    serving = space.index(Process("serving", fence.advance(1, 1).grant(0, TTL), slow=False))
    row = Row(1, kept=1 if rules.accident == "crash" else 0, news=rules.silence)
    return World(1, 1, timers, 0, 0, (row, None), (serving, off))


def steps(world: World, space: Space) -> Iterator[tuple[str, World]]:
    """Every next state. Raises Violation at a step that breaks P2 or P3."""
    rules = space.rules
    if world.version <= len(rules.publications):
        kind = {"d": "deactivation", "r": "rebuild"}[rules.publications[world.version - 1]]
        yield f"publish the {kind}", flushed(world._replace(version=world.version + 1), rules)
    yield from barrier_steps(world, rules)
    yield from accidents(world, rules)
    timers = tuple(left and left - 1 for left in world.timers)
    rows = tuple(row and row._replace(silence=row.silence and row.silence - 1) for row in world.rows)
    passed = world._replace(timers=timers, distrust=max(0, world.distrust - 1), rows=rows)
    for later in product(*map(space.ticks, world.processes)):
        yield "tick", passed._replace(processes=later)
    for place, process in enumerate(world.processes):
        key = place if rules.row_per_process else 0
        for label, after, row in space.steps(Seen(place, process, world.version, world.cleared, world.rows[key])):
            changed = (*world.processes[:place], after, *world.processes[place + 1 :])
            rows = (*world.rows[:key], row, *world.rows[key + 1 :])
            yield f"P{place} {label}", world._replace(processes=changed, rows=rows)


def flushed(world: World, rules: Rules) -> World:
    """A synchronous commit: all that was committed before survives a crash with it."""
    if rules.accident != "crash":
        return world
    return world._replace(rows=tuple(row and row._replace(kept=row.covers, lost=False) for row in world.rows))


def barrier_steps(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """Look, end who is silent, declare (rules 9 and 10)."""
    floors = [version for version, kind in enumerate(rules.publications, start=2) if kind == "d"]
    looked = list(world.timers)
    for number, floor in enumerate(floors):
        known = floor <= world.version or not rules.timer_after_commit
        if known and world.cleared < floor and looked[number] is None:
            older = [left for left in looked[:number] if left is not None]
            looked[number] = rules.wait if rules.timer_per_floor or not older else min(older)
    rows = tuple(row._replace(news=False, silence=rules.wait) if row and row.news else row for row in world.rows)
    after = world._replace(timers=tuple(looked), rows=rows)
    if after != world:
        yield "barrier looks", after
    silent = [row is not None and rules.silence and not row.news and row.silence == 0 for row in world.rows]
    for place, row in enumerate(world.rows):
        if row is not None and not row.ended and silent[place]:
            rows = (*world.rows[:place], row._replace(ended=True), *world.rows[place + 1 :])
            yield f"barrier ends P{place}", flushed(world._replace(rows=rows), rules)
    for floor, left in zip(floors, world.timers, strict=True):
        if left is None or floor > world.version or world.distrust:
            continue
        late = [row is not None and not row.ended and row.covers < floor for row in world.rows]
        if (left == 0 and rules.timer_from_publish) or all(silent[place] for place, lags in enumerate(late) if lags):
            ended = tuple(
                row._replace(ended=True) if row and lags else row for row, lags in zip(world.rows, late, strict=True)
            )
            done = tuple(None if each <= floor else t for each, t in zip(floors, world.timers, strict=True))
            declared = world._replace(cleared=max(world.cleared, floor), rows=ended, timers=done)
            yield f"deactivated {floor}", flushed(declared, rules)


def accidents(world: World, rules: Rules) -> Iterator[tuple[str, World]]:
    """What may happen to Postgres, once."""
    if world.accidents or not rules.accident:
        return
    if rules.accident == "crash":  # of a backend: the postmaster stays, and with it what rule 10 looks at
        anew = rules.silence_anew_after_crash and rules.silence
        rows = tuple(
            row._replace(covers=row.kept, lost=False, news=anew or (row.news and (not row.lost or row.silence is None)))
            if row and row.kept
            else None
            for row in world.rows
        )
        yield "Postgres crashes", world._replace(accidents=1, rows=rows)
        return
    # The ledger's replay restores versions and floors (protocol.md, section 8), but no lease rows.
    waits = rules.wait if rules.distrust_after_restore else 0
    rows = (None,) * len(world.rows)
    timers = (None,) * len(world.timers)
    yield "Postgres is restored", world._replace(accidents=1, rows=rows, distrust=waits, timers=timers)


def search(rules: Rules, *, processes: int = 1, limit: int = 10**7) -> tuple[int, list[str] | None]:
    """Breadth first: the number of states, and the shortest way to a violation or None."""
    space = Space(rules)
    first = start(space, processes)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        try:
            for label, after in steps(world, space):
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
