"""Erasure of one target: weights, what was derived from them, and payloads (protocol.md section 6). No way back."""

import time
from uuid import UUID

import structlog

from service.domain.requests import State
from service.evidence.events import EventKind
from service.store import barrier, cells, erasure, events, objects, payloads, targets
from service.store.artifacts import Artifacts
from service.store.cells import Cell
from service.store.database import Pool, get_time, retrying, transaction
from service.store.objects import Object
from shards.digest import sha256_hex
from workers.context import Context

log = structlog.get_logger()

FREED_SECONDS = 10.0
"""How long erasure waits for model servers to report freed memory; after that it is recorded as unconfirmed."""
REWRITES = 8
"""How often a cell may change under a rewrite before the attempt is given up and repeated later."""


class CellBusyError(Exception):
    """A cell changed under a rewrite; if it does so each time, the target stays `erasing` and is tried again."""


def erase_target(context: Context, request_id: UUID, model_id: int) -> bool:
    """Destroy what the target's records touched; False when it is not this target's turn.

    Safe to run twice and to die anywhere: each piece is looked up again by its state.
    """
    if not _begin(context, request_id, model_id):
        return False
    with transaction(context.pool) as connection:
        target = targets.get_target(connection, request_id, model_id)
    if target is None or target.plan is None or target.version is None:
        return False
    _wait_until_freed(context.pool, model_id, target.version)
    with transaction(context.pool) as connection:
        doomed = objects.list_doomed(connection, target.plan["stages"])
    for each in doomed:
        destroy(context.pool, context.artifacts, each, request_id=request_id, model_id=model_id)
    with transaction(context.pool) as connection:
        open_cells = erasure.list_cells(connection, request_id, model_id)
    for cell_id in open_cells:
        _erase_cell(context, cell_id, request_id)
    with transaction(context.pool) as connection:
        replaced = erasure.list_doomed_payloads(connection, request_id, model_id)
    for each in replaced:
        destroy(context.pool, context.artifacts, each, request_id=request_id, model_id=model_id)
    with transaction(context.pool) as connection:
        done = erasure.mark_erased(connection, request_id, model_id)
    if done:
        context.bell.ring("target.certify", str(request_id), model_id)
    return done


def _begin(context: Context, request_id: UUID, model_id: int) -> bool:
    """To `erasing`, or on with it: the attempt is counted and the artefacts doomed before anything is touched."""

    def step() -> bool:
        with transaction(context.pool) as connection:
            erasure.share_subjects(connection, request_id)
            target = targets.get_target(connection, request_id, model_id, lock=True)
            if target is None or target.erased_at is not None or target.plan is None:
                return False
            state = State(target.state)
            if state not in {State.DEACTIVATED, State.ERASING} or not erasure.may_erase(
                connection, request_id, model_id
            ):
                return False
            if target.attempts >= context.settings.target_attempts:
                targets.mark_failed(connection, request_id, model_id, state, "AttemptsExhausted")
                return False
            targets.raise_attempts(connection, request_id, model_id, state)
            doomed = objects.doom_stages(connection, target.plan["stages"], request_id=request_id, model_id=model_id)
            if state is State.DEACTIVATED:
                erasure.mark_erasing(connection, request_id, model_id)
                events.append(
                    connection,
                    EventKind.TARGET_ERASING,
                    request_id=request_id,
                    model_id=model_id,
                    artifacts=[each.object_name for each in doomed],
                )
            return True

    return retrying(step)


def _wait_until_freed(pool: Pool, model_id: int, version: int) -> None:
    deadline = time.monotonic() + FREED_SECONDS
    while time.monotonic() < deadline:
        with transaction(pool) as connection:
            if barrier.all_freed(connection, model_id, version):
                return
        time.sleep(0.1)
    log.warning("erase.memory_unconfirmed", model_id=model_id, version=version)


def destroy(
    pool: Pool,
    artifacts: Artifacts,
    doomed: Object,
    *,
    request_id: UUID | None = None,
    model_id: int | None = None,
) -> None:
    """Destroy a doomed object's key and the object, look whether both are absent, and record when.

    By the clock that dates certificates.
    """
    artifacts.delete(doomed.object_name)
    with transaction(pool) as connection:
        gone_at = get_time(connection)  # after the deletion and before the look, so true of both
    if artifacts.exists(doomed.object_name):
        raise OSError("an object or its key is still there after its deletion")
    with transaction(pool) as connection:
        objects.mark_destroyed(
            connection,
            doomed,
            destroyed_at=gone_at,
            absent_at=gone_at,
            request_id=request_id,
            model_id=model_id,
        )


def _erase_cell(context: Context, cell_id: int, request_id: UUID) -> None:
    """Rewrite a cell's payloads without the records that may be erased, for all requests that wait for it (rule 23)."""
    for _ in range(REWRITES):
        with transaction(context.pool) as connection:
            cell = cells.get_cell(connection, cell_id)
            out = erasure.list_erasable(connection, cell_id)
        if not out:
            return
        try:
            written = _write_without(context, cell, out)
        except CellBusyError:
            continue
        if _swap(context.pool, cell, written, out, request_id):
            return
        if written:
            with transaction(context.pool) as connection:
                objects.doom(connection, [written])
    raise CellBusyError


def _write_without(context: Context, cell: Cell, out: set[UUID]) -> str | None:
    """The cell's payloads without `out` under a new name; None when nothing is left. Built outside any lock."""
    stored = payloads.decode(context.artifacts.get(cell.object_name)) if cell.object_name else []
    kept = [each for each in stored if each.record.record_id not in out]
    if not kept:
        return None
    data = payloads.encode(kept)
    name = payloads.object_name(sha256_hex(data))
    with transaction(context.pool) as connection:
        if not cells.share_unchanged(connection, cell):
            raise CellBusyError
        objects.insert_writing(
            connection, name, kind="cell", cell_id=cell.cell_id, digest=sha256_hex(data), size=len(data)
        )
    context.artifacts.put(name, data)
    return name


def _swap(pool: Pool, cell: Cell, written: str | None, out: set[UUID], request_id: UUID) -> bool:
    """Point the cell at the new object if it still is as it was read; False: the loser has to start again."""

    def step() -> bool:
        with transaction(pool) as connection:
            (current,) = cells.lock_cells(connection, [cell.cell_id])
            if current != cell or not out <= erasure.list_erasable(connection, cell.cell_id):
                return False  # changed, or held meanwhile: a hold locks the cells
            if written and not objects.mark_live(connection, [written]):
                return False
            generation, manifest = cells.advance(connection, current, object_name=written)
            erasure.mark_records_erased(connection, cell.cell_id, out)
            events.append(
                connection,
                EventKind.CELL_ERASED,
                request_id=request_id,
                shard=cell.shard,
                slice=cell.slice,
                generation=generation,
                root=manifest.root,
                rows=len(manifest.commitments),
                records=len(out),
            )
            objects.doom_replaced(connection, cell.cell_id, kept=written, request_id=request_id)
            return True

    return retrying(step)
