"""The serving fence: what one process may answer from, as an immutable value; no clock, thread or I/O.

`tests/test_fence_model.py` searches every interleaving of this code with delayed and lost messages (protocol.md,
section 2). Times are of one monotonic clock, in seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

Counts = tuple[tuple[int, int], ...]
"""(version, how many), versions rising, no zeros."""


@dataclass(frozen=True, slots=True)
class Fence:
    """State of one (process, model). Every method returns the next state or a fact; the caller holds the lock."""

    pointer: int = 0
    """Version that new work starts on; 0 is none."""
    stable: int = 0
    """An older version that new work may start on as well, while the pointer's is a canary; 0 is none."""
    local_floor: int = 0
    """No final check below it passes, whatever the lease says."""
    lease_until: float = float("-inf")
    """Nothing is answered at or after this moment (rule 7)."""
    computing: Counts = ()
    """Work that has not come to its final check."""
    sending: Counts = ()
    """Answers that passed it and are not yet with the kernel."""

    def advance(self, version: int, floor: int, stable: int = 0) -> Self:
        """Point at a loaded `version` (0: none was loaded) and raise the floor, in one step and without drain (rule 6).

        Both only grow; a pointer below the floor is dropped. `stable` stays beside a newer pointer only where it was
        answered from until now: a version that `covers` has left behind never comes back.
        """
        floor = max(self.local_floor, floor)
        pointer = max(self.pointer, version)
        kept = stable if stable in {self.pointer, self.stable} and floor <= stable < pointer else 0
        return replace(self, local_floor=floor, pointer=pointer if pointer >= floor else 0, stable=kept)

    def grant(self, sent_at: float, ttl: float) -> Self:
        """A heartbeat was granted: its lease counts from before it was *sent* (rules 4 and 5)."""
        return replace(self, lease_until=max(self.lease_until, sent_at + ttl))

    def retire(self) -> Self:
        """Answer nothing, ever again (rule 11)."""
        return replace(self, pointer=0, stable=0, local_floor=2**62, lease_until=float("-inf"))

    def begin(self, version: int = 0) -> Self:
        """Work starts on the pointer's version, or on the stable one if that is named."""
        return replace(self, computing=_added(self.computing, version or self.pointer, 1))

    def abandon(self, version: int) -> Self:
        """Work on `version` ends without an answer."""
        return replace(self, computing=_added(self.computing, version, -1))

    def may_answer(self, version: int, now: float) -> bool:
        """The final check, to be asked in the same event-loop step as the write (rule 7)."""
        return now < self.lease_until and version >= self.local_floor

    def send(self, version: int) -> Self:
        """Work on `version` passed the final check: it counts against `covers` until `sent`."""
        return replace(self, computing=_added(self.computing, version, -1), sending=_added(self.sending, version, 1))

    def send_part(self, version: int) -> Self:
        """A part of an answer passed a final check; the work on the rest goes on (streams)."""
        return replace(self, sending=_added(self.sending, version, 1))

    def sent(self, version: int) -> Self:
        """The kernel has the whole answer, or the connection is gone."""
        return replace(self, sending=_added(self.sending, version, -1))

    @property
    def covers(self) -> int:
        """The lowest version that an answer may still come from: what a heartbeat promises (rules 4 and 6).

        Work below the local floor does not count, since its final check fails.
        """
        could_pass = (version for version, _ in self.computing if version >= self.local_floor)
        return min((self.stable or self.pointer or self.local_floor, *could_pass, *_versions(self.sending)))


def _versions(counts: Counts) -> Iterable[int]:
    return (version for version, _ in counts)


def _added(counts: Counts, version: int, change: int) -> Counts:
    table = dict(counts)
    table[version] = table.get(version, 0) + change
    return tuple(sorted((v, n) for v, n in table.items() if n))
