"""What one process of the model check can do next: load, follow, renew, answer. It runs the real `Fence`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fence_model_rules import TTL, Beat, Process, Row, Rules, Violation

from service.serving.fence import Fence


class Seen(NamedTuple):
    """What the next step of a process depends on."""

    place: int
    process: int
    version: int
    cleared: int
    row: Row | None


class Step(NamedTuple):
    """What a process can do: the label, the process after it, and its row."""

    label: str
    process: int
    row: Row | None


@dataclass
class Space:
    """The steps of all processes under one set of rules."""

    rules: Rules
    processes: list[Process] = field(default_factory=list[Process])
    _indices: dict[Process, int] = field(default_factory=dict[Process, int])
    _steps: dict[Seen, list[Step] | Violation] = field(default_factory=dict[Seen, list[Step] | Violation])
    _ticks: dict[int, list[int]] = field(default_factory=dict[int, list[int]])

    def index(self, process: Process) -> int:
        if process not in self._indices:
            self._indices[process] = len(self.processes)
            self.processes.append(process)
        return self._indices[process]

    def steps(self, seen: Seen) -> list[Step]:
        """Raises Violation at a step that breaks a promise."""
        if seen not in self._steps:
            process = self.processes[seen.process]
            try:
                found = [Step(label, self.index(after), row) for label, after, row in _moves(seen, process, self.rules)]
                self._steps[seen] = found
            except Violation as violation:
                self._steps[seen] = violation
        known = self._steps[seen]
        if isinstance(known, Violation):
            raise known
        return known

    def ticks(self, process: int) -> list[int]:
        """The process after a tick, which its clock may miss."""
        if process not in self._ticks:
            self._ticks[process] = [self.index(after) for after in _ticked(self.processes[process])]
        return self._ticks[process]


Move = tuple[str, Process, Row | None]


def _moves(seen: Seen, process: Process, rules: Rules) -> Iterator[Move]:
    if process.phase == "off":
        for known in range(1, seen.version + 1):  # read long ago, perhaps
            fence = process.fence.advance(known, rules.floors[known])
            yield f"loads {known}", process._replace(phase="loaded", fence=fence), seen.row
        return
    if seen.place == 0 or rules.second_answers:
        yield from ((label, after, seen.row) for label, after in _answers(seen, process, rules))
    for known in range(1, seen.version + 1):
        for loaded in (known, 0):  # 0: its artefact is damaged
            floor = rules.floors[known] if rules.ack_when_old_work_cannot_pass else 0
            fence = process.fence
            if not rules.never_backwards and loaded and loaded >= max(fence.local_floor, floor):
                fence = replace(fence, pointer=loaded)
            yield f"follows {known} with {loaded}", process._replace(fence=fence.advance(loaded, floor)), seen.row
            if loaded and rules.canary and floor < known:
                after = process._replace(fence=process.fence.advance(loaded, floor, stable=known - 1))
                yield f"follows {known} as a canary", after, seen.row
    registers = process.phase == "loaded"
    if len(process.beats) < (1 if registers else rules.beats):
        beat = Beat("sent", registers, _covers(process.fence, rules), 0, 0, slow=False)
        yield "sends a heartbeat", process._replace(beats=tuple(sorted({*process.beats, beat}))), seen.row
    for beat in process.beats:
        rest = process._replace(beats=tuple(other for other in process.beats if other is not beat))
        yield "message lost", rest, seen.row
        yield from _beat_moves(seen, rest, beat, rules)


def _covers(fence: Fence, rules: Rules) -> int:
    if not rules.ack_when_old_work_cannot_pass:
        return fence.pointer
    if not rules.sending_counts:
        fence = replace(fence, sending=())
    return (fence if rules.computing_counts else replace(fence, computing=())).covers


def is_tainted(version: int, cleared: int, rules: Rules) -> bool:
    """Whether no answer may come from `version` once `cleared` was declared."""
    rebuilt = version > 1 and rules.publications[version - 2] == "r"
    return version < cleared or (rebuilt and cleared > 1 and not rules.rebuild_checks_taint)


def _answers(seen: Seen, process: Process, rules: Rules) -> Iterator[tuple[str, Process]]:
    """One request at a time: begin, final checks, writes; in parts, the work goes on behind each."""
    fence, cleared = process.fence, seen.cleared
    for version, _ in fence.computing:
        unchecked = not rules.check_after_computing or process.stream == version
        if unchecked or fence.may_answer(version, 0 if rules.leases else float("-inf")):
            if is_tainted(version, cleared, rules):
                raise Violation("P2: a final check passed")
            yield f"checks {version}", process._replace(fence=fence.send(version), stream=0)
            if rules.parts and not fence.sending:
                stream = 0 if rules.check_every_part else version
                yield f"checks a part of {version}", process._replace(fence=fence.send_part(version), stream=stream)
        else:
            yield f"abandons {version}", process._replace(fence=fence.abandon(version), stream=0)
    for version, _ in fence.sending:
        acknowledged = seen.row is not None and not seen.row.ended
        if acknowledged and is_tainted(version, cleared, rules):
            raise Violation("P3: an acknowledged process wrote")
        yield f"writes {version}", process._replace(fence=fence.sent(version))
    # Without the check after, the one before is the only one.
    checked = rules.check_before_computing or not rules.check_after_computing
    may_begin = not checked or fence.may_answer(fence.pointer, 0)
    if fence.pointer and not fence.computing and not fence.sending and may_begin:
        yield f"begins on {fence.pointer}", process._replace(fence=fence.begin())
        if fence.stable:
            yield f"begins on {fence.stable}", process._replace(fence=fence.begin(fence.stable))


def _beat_moves(seen: Seen, rest: Process, beat: Beat, rules: Rules) -> Iterator[Move]:
    """What becomes of a message: the transaction, then the reply."""
    row = seen.row
    if beat.stage == "granted" and rules.grant_is_checked and beat.covers < rest.fence.local_floor:
        yield "grant is not taken", rest, row
        return
    if beat.stage == "granted":
        fence = rest.fence.grant(-(beat.age if rules.expiry_from_before_sending else 0), TTL)
        slow = beat.slow if fence.lease_until > rest.fence.lease_until else rest.slow
        yield "is granted", rest._replace(phase="serving", fence=fence, slow=slow), row
        return
    if beat.stage == "sent" and not rules.one_lock:
        read = beat._replace(stage="read", floor=rules.floors[seen.version])
        yield "transaction reads", rest._replace(beats=tuple(sorted({*rest.beats, read}))), row
        return
    floor = rules.floors[seen.version] if rules.one_lock else beat.floor
    checked = rules.registration_checks_floor if beat.registers else rules.refuse_below_floor
    open_row = row is not None and not row.ended and (not rules.token or row.owner == seen.place)
    if checked and beat.covers < floor:
        yield "is refused", rest, row
    elif not beat.registers and not open_row:
        yield "is refused as ended", rest, row
    else:
        granted = beat._replace(stage="granted", floor=0)
        after = rest._replace(beats=tuple(sorted({*rest.beats, granted})))
        yield "transaction commits", after, _renewed(row, beat, seen.place, rules)


def _renewed(row: Row | None, beat: Beat, place: int, rules: Rules) -> Row:
    """The row after a registration or a renewal. A renewal need not survive a crash (rule 12)."""
    before = row or Row(0)
    covers = beat.covers if beat.registers else max(before.covers, beat.covers)
    durable = beat.registers and rules.registration_is_durable
    return Row(
        covers,
        owner=place if rules.token and beat.registers else before.owner,
        kept=(covers if durable else before.kept) if rules.accident == "crash" else 0,
        lost=not durable and rules.accident == "crash",
        news=rules.silence,
        silence=before.silence,
    )


def _ticked(process: Process) -> Iterator[Process]:
    """A tick passes; the clock may miss it, but not twice while anything that it timed is still open."""
    left = process.fence.lease_until
    yield process._replace(
        fence=replace(process.fence, lease_until=max(0, left - 1)),
        slow=process.slow and left > 1,
        beats=tuple(sorted({beat._replace(age=min(TTL, beat.age + 1)) for beat in process.beats})),
    )
    lost_before = any(beat.slow for beat in process.beats) or (process.slow and left > 0)
    if (process.beats or left > 0) and not lost_before:
        late = tuple(sorted({beat._replace(slow=True) for beat in process.beats}))
        yield process._replace(slow=left > 0, beats=late)
