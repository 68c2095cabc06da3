"""What the model check is made of: one process, its row, the world, and the rules that a mutant lacks."""

from dataclasses import dataclass
from typing import NamedTuple

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
    stream: int = 0
    """Version of a stream that was begun; kept only where its parts are not checked."""


class Row(NamedTuple):
    """A lease row, and what the barrier knows of it."""

    covers: int
    ended: bool = False
    owner: int = 0
    """Who registered last; kept only where rows are shared."""
    kept: int = 0
    """What a crash leaves of `covers`; 0: not even the row."""
    lost: bool = False
    """Whether a crash would undo the newest renewal."""
    news: bool = False
    """Whether it renewed since the barrier looked."""
    silence: int | None = None
    """Ticks until the barrier takes it for silent; None before it ever looked."""


class World(NamedTuple):
    """Everything."""

    version: int
    cleared: int
    timers: tuple[int | None, ...]
    """Per floor: ticks until it may be declared without acknowledgements; None before it was read, and after."""
    distrust: int
    """Ticks until acknowledgements count: another Postgres has taken over (rule 10)."""
    accidents: int
    rows: tuple[Row | None, ...]
    processes: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """The protocol; a mutant lacks one of them."""

    expiry_from_before_sending: bool = True
    check_after_computing: bool = True
    check_every_part: bool = True
    refuse_below_floor: bool = True
    one_lock: bool = True
    registration_checks_floor: bool = True
    row_per_process: bool = True
    ack_when_old_work_cannot_pass: bool = True
    sending_counts: bool = True
    rebuild_checks_taint: bool = True
    margin: bool = True
    leases: bool = True
    timer_per_floor: bool = True
    timer_after_commit: bool = True
    timer_from_publish: bool = True
    """Without it only silence expires a lease."""
    distrust_after_restore: bool = True
    registration_is_durable: bool = True
    silence_anew_after_crash: bool = True
    # Cheap hygiene: the protocol holds without.
    check_before_computing: bool = False
    never_backwards: bool = False
    token: bool = False
    """Only the newest registrant of a row renews it."""
    grant_is_checked: bool = False
    """A grant for less than the local floor is not taken."""
    computing_counts: bool = True
    """Work that was begun before a rebuild holds `covers` down: for what waits on memory, not for the promises."""
    # Not rules, but what is searched:
    publications: str = "d"
    """What follows version 1: `d`eactivations, which raise the floor, and `r`ebuilds."""
    beats: int = 1
    parts: bool = True
    """Whether answers may come in parts."""
    second_answers: bool = True
    """Whether the second process answers too, or only has a row."""
    canary: bool = False
    """Whether a rebuild may serve beside the version before it, for a while."""
    silence: bool = False
    """Whether the barrier also ends processes that have not renewed for a lease's length."""
    accident: str = ""
    """`crash`: what was committed asynchronously is lost; `restore`: all lease rows are."""

    @property
    def floors(self) -> tuple[int, ...]:
        """By version."""
        found = [0, 1]
        for version, kind in enumerate(self.publications, start=2):
            found.append(version if kind == "d" else found[-1])
        return tuple(found)

    @property
    def wait(self) -> int:
        """Ticks of a barrier's timer."""
        return TTL + (MARGIN if self.margin else 0)


class Violation(Exception):  # noqa: N818
    """A tainted answer after `deactivated`; the argument is which promise broke."""
