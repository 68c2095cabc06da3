"""`expunge restore`: database, artefact store and ledger are brought to one moment again, the latest that is known.

protocol.md, section 8. Nothing is taken in, registered, signed or served meanwhile. Safe to die anywhere: the next run
goes on, since leaves and what they record are one transaction, and every later step looks at what is there.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from service.evidence.events import EventKind
from service.evidence.tree_head import Verifier, read_head
from service.settings import Settings
from service.store import barrier, events, ledger, mirror, models, publish, restore_rows, restores, vetting
from service.store.artifacts import Artifacts
from service.store.database import Pool, transaction
from service.store.ledger_files import LedgerFiles, read_high_water
from service.store.restores import Loss
from workers import restore_objects
from workers.restore_survey import RestoreError, Survey, read_leaves, survey
from workers.sequencer import Sequencer

log = structlog.get_logger()

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore found and did."""

    survey: Survey
    replayed: int = 0
    redestroyed: int = 0
    """Objects that had been destroyed and were there again."""
    lost: int = 0
    """Files of live stages that were missing or damaged: trained again."""
    strays: int = 0
    """Objects that no row knows."""
    stages: int = 0
    """Files of stages that had learnt a record that is erased, or that is lost."""
    recovered: int = 0
    """Records that the database had lost and payload files gave back, with whom they concern."""
    records: int = 0
    """Records that must be uploaded again."""
    losses: list[Loss] = field(default_factory=list[Loss])
    """Leaves that could not be applied."""
    certificates: list[str] = field(default_factory=list[str])
    """Requests whose certificate's text is lost here."""
    keys: list[str] = field(default_factory=list[str])
    """API keys whose secrets are lost."""


@dataclass(frozen=True, slots=True)
class Stores:
    """What is restored. `pool` is of the schema's owner, in the mode of `restores.MODE`."""

    settings: Settings
    pool: Pool
    artifacts: Artifacts
    keys: Verifier
    """Who may have signed tree heads here."""

    @property
    def files(self) -> LedgerFiles:
        """The ledger's."""
        return LedgerFiles(self.artifacts)

    @property
    def high_water(self) -> Path:
        """The file that keeps the largest tree head."""
        return self.settings.ledger_high_water or self.settings.keys_dir / "tree-head"


def restore(stores: Stores, *, checkpoint: bytes | None, accept_loss: bool, tell: Tell) -> Report:
    """Bring everything to the latest state that is known, and open.

    Args:
        stores: all of them, with every program of the installation stopped or shut out by the quarantine.
        checkpoint: a tree head that was kept elsewhere; None where the high-water file is enough.
        accept_loss: whether what cannot be brought back may be given up. It is recorded.
        tell: called with each step.

    Raises:
        ForkError: two histories; nothing was changed.
        RestoreError: what the operator has to decide or find; the installation stays shut.
    """
    high_water = read_high_water(stores.high_water)
    outside = [each for each in (high_water, checkpoint) if each is not None]
    with transaction(stores.pool) as connection:
        given_up = (vetting.get(connection).progress or {}).get("given_up")
        found = survey(connection, stores.files, stores.keys, outside, given_up=given_up)
    with transaction(stores.pool) as connection:
        restores.begin(connection, {"database": found.database, "lost": found.lost, "replayed": 0})
    tell(_sizes(found))
    if found.lost and not accept_loss:
        raise RestoreError(_both_older(found))
    replayed = _replay(stores, found)
    _require_whole(stores, accept_loss=accept_loss)
    lost = _pad(stores, found)
    tell(f"{replayed} leaves were replayed")
    report = _mend(stores, found, accept_loss=accept_loss, tell=tell)
    _serve(stores, lost)
    tell("every process was ended; waiting until no lease can stand any more")
    _declare(stores)
    _complete(stores, report)
    tell("open")
    return report


def _replay(stores: Stores, found: Survey) -> int:
    """Step 3: leaves that the database lacks come back, each with what it records."""
    if found.files is None or found.files.size <= found.database:
        return 0
    count = 0
    for batch in read_leaves(stores.files, found.database, found.files.size):
        with transaction(stores.pool) as connection:
            restores.replay(connection, batch)
            restores.mark_progress(connection, replayed=batch[-1].leaf.index + 1 - found.database)
        count += len(batch)
    with transaction(stores.pool) as connection:
        mirror.count_on(connection)
    return count


def _require_whole(stores: Stores, *, accept_loss: bool) -> None:
    with transaction(stores.pool) as connection:
        losses = restores.list_losses(connection)
    if losses and not accept_loss:
        first = "; ".join(f"{each.what} {each.body}" for each in losses[:5])
        raise RestoreError(
            f"{len(losses)} leaves could not be applied, since their openings were erased by age or what they are about"
            f" is missing: {first}. Restore a newer backup of the database; or go on without them, --accept-loss"
        )


def _pad(stores: Stores, found: Survey) -> int:
    """Signed leaves that are nowhere keep their numbers: no tree head is ever signed beside a lost one (rule 16)."""
    with transaction(stores.pool) as connection:
        size = ledger.get_head(connection).size
        head, losses = found.high_water, restores.list_losses(connection)
        if found.lost or losses:
            missing = max(0, head.size - size) if head else 0
            if missing:
                restores.insert_lost_leaves(connection, size, size + missing)
                restores.mark_progress(connection, given_up=head.root.hex() if head else None)
            events.append(
                connection,
                EventKind.RESTORE_LOSS_ACCEPTED,
                size=head.size if head else size,
                root=head.root.hex() if head else "",
                leaves=missing,
                openings=sum(each.what == "opening" for each in losses),
                refused=sum(each.what == "refused" for each in losses),
            )
    _put_aside(stores)
    _sequence(stores)
    with transaction(stores.pool) as connection:
        return int((vetting.get(connection).progress or {}).get("lost", 0))


def _put_aside(stores: Stores) -> None:
    """Keep a tree head whose leaves are lost out of the way of the next one, and for whoever asks."""
    with transaction(stores.pool) as connection:
        given_up = (vetting.get(connection).progress or {}).get("given_up")
    data = read_high_water(stores.high_water)
    head = read_head(data.decode(errors="replace")) if data is not None else None
    if head is not None and head.root.hex() == given_up:
        stores.high_water.rename(stores.high_water.with_name(f"{stores.high_water.name}.lost-{head.size}"))


def _mend(stores: Stores, found: Survey, *, accept_loss: bool, tell: Tell) -> Report:
    """Steps 4 and 5: files and rows say the same, and neither holds what a deletion took."""
    compared = restore_objects.compare_cells(stores.pool, stores.artifacts)
    strangers, lost = sum(len(each.strangers) for each in compared), sum(len(each.lost) for each in compared)
    unreadable = sum(each.unreadable for each in compared)
    if (strangers or lost or unreadable) and not accept_loss:
        raise RestoreError(
            f"of {strangers} records nobody knows whose they are, {lost} have lost their payload, and {unreadable}"
            " payload files are missing or damaged. What they held has to leave, with what was trained on it, and may"
            " be uploaded again. Restore a newer backup of the store that is older; or go on, --accept-loss"
        )
    redestroyed = restore_objects.destroy_again(stores.pool, stores.artifacts)
    for each in compared:
        restore_objects.settle(stores.pool, stores.artifacts, each)
    stages = restore_objects.doom_tainted(stores.pool, stores.artifacts)
    lost_files = restore_objects.find_lost(stores.pool, stores.artifacts)
    strays = restore_objects.remove_strays(stores.pool, stores.artifacts)
    tell(f"{redestroyed} objects were destroyed again, {stages} of tainted stages, {strays} that no row knows")
    tell(f"{lost_files} files of stages are missing and will be trained again")
    with transaction(stores.pool) as connection:
        progress = vetting.get(connection).progress or {}
        return Report(
            found,
            replayed=int(progress.get("replayed", 0)),
            redestroyed=redestroyed,
            lost=lost_files,
            strays=strays,
            stages=stages,
            recovered=int(progress.get("recovered", 0)),
            records=strangers + lost,
            losses=restores.list_losses(connection),
            certificates=restore_rows.list_uncertified(connection),
            keys=restore_rows.list_keys(connection),
        )


def _serve(stores: Stores, lost: int) -> None:
    """Step 6: no process of before may answer, and each model serves what is clean now under a number of its own."""
    with transaction(stores.pool) as connection:
        restore_rows.end_leases(connection)
        every = models.list_models(connection)
    for each in every:
        with transaction(stores.pool) as connection:
            model = models.lock_model(connection, each.model_id)
            if model.version:
                restore_rows.skip_versions(connection, model.model_id, lost=lost)
                model = models.lock_model(connection, model.model_id)
                publish.publish(connection, model, publish.candidate(connection, model), cause="restore")
            models.mark_rebuild_wanted(connection, model.model_id)


def _declare(stores: Stores) -> None:
    """Wait as long as any lease may stand (rule 10), then say that nobody answers from below the new floors."""
    with transaction(stores.pool) as connection:
        longest = max(stores.settings.lease_ttl_ms / 1000, restore_rows.longest_lease(connection))
    time.sleep(longest + stores.settings.lease_margin_ms / 1000)
    with transaction(stores.pool) as connection:
        every = models.list_models(connection)
    for model in every:
        with transaction(stores.pool) as connection:
            if barrier.declare(connection, model.model_id, model.floor, expired={}) is None:
                raise RestoreError(
                    "a process registered while the installation was shut: stop every program, try again"
                )


def _complete(stores: Stores, report: Report) -> None:
    """Step 7: what was done is a leaf, under a larger tree head; then everything opens."""
    found = report.survey
    with transaction(stores.pool) as connection:
        progress = vetting.get(connection).progress or {}
    counts: dict[str, Any] = {
        name: value
        for name, value in asdict(report).items()
        if name in {"replayed", "redestroyed", "lost", "strays", "stages", "recovered", "records"}
    }
    with transaction(stores.pool) as connection:
        events.append(
            connection,
            EventKind.RESTORE_COMPLETED,
            database=progress.get("database", found.database),
            files=found.files.size if found.files else 0,
            high_water=found.high_water.size if found.high_water else None,
            **counts,
        )
    _sequence(stores)
    Sequencer(stores.pool, stores.artifacts, stores.settings).publish()
    with transaction(stores.pool) as connection:
        restores.open_again(connection)


def _sequence(stores: Stores) -> None:
    """Number what waits."""
    while _numbered(stores.pool) == ledger.BATCH:
        pass


def _numbered(pool: Pool) -> int:
    with transaction(pool) as connection:
        return ledger.sequence(connection)


def _sizes(found: Survey) -> str:
    files = found.files.size if found.files else "no"
    high = found.high_water.size if found.high_water else "unknown: whether both are old cannot be seen"
    return f"leaves: {found.database} in the database, {files} in the artefact store, high water {high}"


def _both_older(found: Survey) -> str:
    return (
        f"database and artefact store are both older than {found.high_water}: {found.lost} leaves were signed that are"
        " in neither, and deletions may be among them. Restore a newer backup of either; or go on without them,"
        " --accept-loss, and do again every deletion since"
    )
