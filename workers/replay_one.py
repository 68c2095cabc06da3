"""One replay in a process of its own: `python -m workers.replay_one REPLAY TOKEN`, run by a training worker.

A served stage's chain is trained from nothing on the payloads, on one thread, and compared with the digests that are
served. Nothing that it computes is written anywhere; features and weights go with the process.
"""

import _thread
import argparse
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from service.domain.replays import ReplayOutcome
from service.logs import configure_logs
from service.store import cells, lineage, models, payloads, replays, served, stages
from service.store.database import transaction
from service.store.models import Model
from service.store.replays import Claim
from shards.engine.determinism import prepare
from shards.engine.registry import open_trainer
from shards.engine.replay import Comparison, comparable, compare, platform_of, replay
from shards.manifest import Record
from shards.plan import ancestry
from shards.stages import Stage
from workers.context import Context, context
from workers.verdicts import Verdict, end_replay

log = structlog.get_logger()

ENDED = 3
"""Exit code of a process whose worker has died or has no use for it any more."""
GRACE_SECONDS = 5.0
"""How long it may take to leave."""
LOOK_SECONDS = 5.0
"""How often a long replay looks whether one of its records was deleted, or the replay given to another."""


class SkippedError(Exception):
    """The stage cannot be compared any more, through no fault of its own; the argument says why."""


class GoneError(Exception):
    """The replay has ended, or is another worker's."""


@dataclass(frozen=True, slots=True)
class Line:
    """A served stage and what it stands on, shortest prefix first."""

    stages: tuple[Stage, ...]
    digests: list[str]
    made_on: list[list[dict[str, str]]]
    """Per stage the platforms that gave its digest: mostly one."""


def replay_one(context: Context, replay_id: int, token: int) -> Verdict | None:
    """Replay what was claimed and write down what came of it; None where nothing did, and it is tried again later."""
    with transaction(context.pool) as connection:
        claim = replays.get_claimed(connection, replay_id, token)
    if claim is None:
        return None
    try:
        verdict = _judge(context, claim)
    except GoneError:
        return None
    except SkippedError as skipped:
        verdict = Verdict(ReplayOutcome.SKIPPED, reason=str(skipped))
    except Exception as failure:  # noqa: BLE001 - whatever it is, the class goes on the row
        with transaction(context.pool) as connection:
            tainted = bool(stages.list_touched(connection, [claim.stage_key]))
            if not tainted:
                replays.postpone(connection, claim, type(failure).__name__)
        if not tainted:
            log.warning("stage.replay_attempt_failed", stage=claim.stage_key, error=type(failure).__name__)
            return None
        verdict = Verdict(ReplayOutcome.SKIPPED, reason="Tainted")  # its payloads went while they were read
    return verdict if end_replay(context, claim, verdict) else None


def _judge(context: Context, claim: Claim) -> Verdict:
    """Compare platforms first, then train as far as they agree."""
    with transaction(context.pool) as connection:
        model = models.get_model_by_id(connection, claim.model_id)
    if model.parsed_recipe.engine == "external" and not model.reproducible:
        raise SkippedError("NotReproducible")  # nothing is claimed that a difference could refute
    line = _line(context, model, claim)
    prepare()
    trainer = open_trainer(model.parsed_recipe, context.settings.device, context.settings.commands)
    here = platform_of(trainer, context.settings.device)
    made_on = [here if here in platforms else platforms[0] for platforms in line.made_on]
    depth = comparable(made_on, here)
    found: list[str] = []
    if depth:
        records = _records(context, claim)
        looked = time.monotonic()

        def progress(_done: int, _total: int) -> None:
            nonlocal looked
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                _check(context, claim)

        found = replay(trainer, line.stages[:depth], records, progress)
        _check(context, claim)
    return _verdict(compare(line.stages, line.digests, found, here, made_on))


def _verdict(compared: Sequence[Comparison]) -> Verdict:
    here = dict(compared[0].fingerprint)
    for one in compared:  # the first that differs is at fault; what stands on it differs with it
        if one.outcome == ReplayOutcome.MISMATCH:
            return Verdict(ReplayOutcome.MISMATCH, here, stage=one.stage, expected=one.expected, found=one.found)
    for one in compared:
        if one.outcome == ReplayOutcome.OTHER_PLATFORM:
            return Verdict(ReplayOutcome.OTHER_PLATFORM, here, differs=one.differs)
    return Verdict(ReplayOutcome.EQUAL, here, found=compared[-1].found)


def _line(context: Context, model: Model, claim: Claim) -> Line:
    """What is served now, if it still is what was drawn."""
    with transaction(context.pool) as connection:
        if stages.list_touched(connection, [claim.stage_key]):
            raise SkippedError("Tainted")
        found = stages.list_open(connection, model.model_id, model.recipe_digest)
        if found.digests.get(claim.stage_key) != claim.digest:
            raise SkippedError("Replaced")
        line = ancestry(found.stages[claim.stage_key], found.live())
        if line is None:
            raise SkippedError("ParentGone")
        made = served.list_platforms(connection, [stage.key for stage in line])
    digests = [found.digests[stage.key] for stage in line]
    made_on = [
        [each.platform for each in made if (each.stage_key, each.digest) == (stage.key, digest)]
        for stage, digest in zip(line, digests, strict=True)
    ]
    return Line(line, digests, made_on)


def _records(context: Context, claim: Claim) -> dict[int, list[Record]]:
    """The records of each slice that the stage reads, as its manifests say."""
    with transaction(context.pool) as connection:
        reads = lineage.list_reads(connection, claim.stage_key)
        active = {read.slice: cells.list_active(connection, read.cell_id, read.generation) for read in reads}
    return {
        read.slice: [
            stored.record
            for stored in (payloads.decode(context.artifacts.get(read.object_name)) if read.object_name else [])
            if stored.record.record_id in active[read.slice]
        ]
        for read in reads
    }


def _check(context: Context, claim: Claim) -> None:
    """Stop as soon as the replay is another's or a record of it was deleted."""
    with transaction(context.pool) as connection:
        if replays.get_claimed(connection, claim.replay_id, claim.token) is None:
            raise GoneError
        if stages.list_touched(connection, [claim.stage_key]):
            raise SkippedError("Tainted")


def _end_with_parent() -> None:
    """The worker holds the other end of standard input: its end is ours, and what was written aside is removed."""

    def wait() -> None:
        while os.read(0, 1):  # unbuffered: a buffer's lock could not be taken at the interpreter's end
            pass
        _thread.interrupt_main()
        time.sleep(GRACE_SECONDS)
        os._exit(ENDED)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Replay once; 0 unless the process could not even say that it failed."""
    parser = argparse.ArgumentParser(description="Train one drawn stage again from nothing and compare digests.")
    parser.add_argument("replay", type=int, help="replay id")
    parser.add_argument("token", type=int, help="token of the claim")
    options = parser.parse_args(arguments)
    configure_logs("replay")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker in the background ignores it, and so would we
    try:
        _end_with_parent()
        replay_one(context(), options.replay, options.token)
    except KeyboardInterrupt:
        return ENDED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
