"""Replays: draws served stages day by day, and has each trained again in a fresh process of its own."""

import json
import os
import socket
import subprocess
import sys
import time

import structlog

from service.domain.errors import UnavailableError
from service.domain.replays import ReplayOutcome
from service.evidence.events import EventKind
from service.settings import Settings
from service.store import draws, events, replays
from service.store.database import Pool, transaction
from service.store.replays import Claim
from workers.bell import Bell
from workers.context import Context

log = structlog.get_logger()

ATTEMPTS = 3
"""How often a replay may fail, at growing distances, before it shows `failed`."""
LEASE_SECONDS = 30.0
"""A claimed replay without a beat for this long has lost its worker."""
BEAT_SECONDS = 2.0
QUIET_SECONDS = 60.0
"""How long a replay that was rung may take to be claimed before it is rung again."""
LEAVE_SECONDS = 10.0
"""How long a process whose replay has ended, or is another's, may take to leave."""


class Replays:
    """One look at a time, at the caller's pace; any number of these may run."""

    def __init__(self, pool: Pool, bell: Bell, *, sample: int) -> None:
        """`sample`: how many served stages of each model are drawn a day; 0 draws none."""
        self._pool = pool
        self._bell = bell
        self._sample = sample
        self._rung: dict[int, float] = {}

    def look(self) -> int:
        """Draw today's sample, give up what keeps failing, ring for the next that waits; returns how many were drawn.

        One at a time, and only while no other message waits: a replay is never urgent.
        """
        drawn = self._draw() if self._sample else 0
        self._give_up()
        with transaction(self._pool) as connection:
            due = replays.list_due(connection)
        now = time.monotonic()
        self._rung = {replay_id: at for replay_id, at in self._rung.items() if now - at < QUIET_SECONDS}
        waiting = [replay_id for replay_id in due if replay_id not in self._rung]
        if waiting and self._bell.waiting("train") == 0:
            self._rung[waiting[0]] = now
            self._bell.ring("stages.replay", waiting[0])
        return drawn

    def _draw(self) -> int:
        with transaction(self._pool) as connection:
            undrawn = draws.list_undrawn(connection)
        drawn = 0
        for model_id in undrawn:
            with transaction(self._pool) as connection:
                drawn += draws.draw_today(connection, model_id, self._sample)
        return drawn

    def _give_up(self) -> None:
        with transaction(self._pool) as connection:
            for claim in replays.list_hopeless(connection, limit=ATTEMPTS):
                error = claim.reason or "WorkerLost"
                if replays.mark_ended(connection, claim, ReplayOutcome.FAILED, reason=error):
                    log.error("stage.replay_failed", stage=claim.stage_key, error=error)
                    events.append(
                        connection,
                        EventKind.STAGE_REPLAY_FAILED,
                        model_id=claim.model_id,
                        stage=claim.stage_key,
                        digest=claim.digest,
                        error=error,
                    )


def run_replay(context: Context, replay_id: int) -> bool:
    """Have a process of its own replay what was drawn; False where it is not this worker's turn.

    The process writes down what came of it. One that dies has its replay tried again later.
    """
    with transaction(context.pool) as connection:
        claim = replays.claim_replay(connection, replay_id, host=socket.gethostname(), seconds=LEASE_SECONDS)
    if claim is None:
        return False
    code = _run(context, claim)
    if code != 0:
        log.warning("stage.replay_process_died", stage=claim.stage_key, code=code)
        with transaction(context.pool) as connection:
            replays.postpone(connection, claim, "ProcessDied")
    return True


def _run(context: Context, claim: Claim) -> int:
    """The process's exit code; it is killed when its replay is given to another."""
    command = [sys.executable, "-m", "workers.replay_one", str(claim.replay_id), str(claim.token)]
    # Its standard input ends with this process: nobody trains on for a worker that has died.
    process = subprocess.Popen(command, env=_environment(context.settings), stdin=subprocess.PIPE)
    deadline: float | None = None
    try:
        while deadline is None or time.monotonic() < deadline:
            try:
                return process.wait(timeout=BEAT_SECONDS)
            except subprocess.TimeoutExpired:
                if not _beat(context.pool, claim) and deadline is None:
                    deadline = time.monotonic() + LEAVE_SECONDS
    finally:
        _end(process)
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """Close its standard input, which asks it to leave, and insist."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _beat(pool: Pool, claim: Claim) -> bool:
    try:
        with transaction(pool) as connection:
            return replays.beat(connection, claim, seconds=LEASE_SECONDS)
    except UnavailableError:
        return True  # a lost beat costs at most the replay, which is then drawn on by another worker


def _environment(settings: Settings) -> dict[str, str]:
    """This process's environment with its settings, and one thread, which exactness needs."""
    values = settings.model_dump(mode="json", include=settings.model_fields_set, exclude_none=True)
    own = {f"EXPUNGE_{name.upper()}": v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return {**os.environ, **own, **one}
