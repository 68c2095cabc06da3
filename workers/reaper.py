"""The reaper: what a crash left behind is found by its state and brought to an end."""

import time

import structlog

from service.evidence.events import EventKind
from service.store import do_not_train, events, jobs, objects, vetting
from service.store.artifacts import Artifacts
from service.store.database import Pool, transaction
from service.store.ledger_files import is_ledger_file
from workers.erase import destroy

log = structlog.get_logger()

STALLED_SECONDS = 15.0
"""A running job without a beat for this long has lost its worker."""
ABANDONED_SECONDS = 600.0
"""A `writing` object this old, with no job at work on it, will not be finished."""
STRAY_SECONDS = 3600.0
"""How often the store is listed for objects without a row."""
RETENTION_SECONDS = 600.0
"""How often certificates and the do-not-train list are looked through for what is too old."""


class Reaper:
    """One look at a time, at the caller's pace; any number of reapers may run."""

    def __init__(
        self,
        pool: Pool,
        artifacts: Artifacts,
        *,
        job_attempts: int,
        certificate_days: int | None = None,
        do_not_train_days: int | None = None,
    ) -> None:
        """`job_attempts`: how often a job may be tried before it shows as failed. Days are of retention; None: none."""
        self._pool = pool
        self._artifacts = artifacts
        self._job_attempts = job_attempts
        self._certificate_days = certificate_days
        self._do_not_train_days = do_not_train_days
        self._listed = time.monotonic()
        self._ended = -RETENTION_SECONDS

    def look(self) -> None:
        """Queue stalled jobs again, destroy what is doomed, look again for what was destroyed."""
        vetting.require_open(self._pool)  # an older database does not know what lies in the store
        self._requeue()
        with transaction(self._pool) as connection:
            objects.doom_abandoned(connection, seconds=ABANDONED_SECONDS)
            doomed = objects.list_doomed(connection)
        for each in doomed:
            destroy(self._pool, self._artifacts, each)
        self._sweep()
        if time.monotonic() - self._listed > STRAY_SECONDS:
            self._listed = time.monotonic()
            self.remove_strays()
        if time.monotonic() - self._ended > RETENTION_SECONDS:
            self._ended = time.monotonic()
            self.end_by_age()

    def end_by_age(self) -> None:
        """Erase certificates and entries of the do-not-train list that are past their retention."""
        with transaction(self._pool) as connection:
            entries = do_not_train.end_by_age(connection, days=self._do_not_train_days)
            days = self._certificate_days
            certificates = do_not_train.erase_certificates(connection, days=days) if days is not None else 0
        if entries or certificates:
            log.info("retention.ended", entries=entries, certificates=certificates)

    def _requeue(self) -> None:
        with transaction(self._pool) as connection:
            for job in jobs.list_stalled(connection, seconds=STALLED_SECONDS):
                tried = jobs.mark_tried(connection, job, "WorkerLost", limit=self._job_attempts)
                log.warning("stage.worker_lost", stage=job.stage_key, attempts=job.attempts)
                if tried and tried.state == "failed":
                    events.append(
                        connection,
                        EventKind.STAGE_FAILED,
                        model_id=job.model_id,
                        stage=job.stage_key,
                        error="WorkerLost",
                        attempts=tried.attempts,
                    )

    def _sweep(self) -> None:
        """A paused writer may upload after the deletion: look again after a minute, an hour and a day (rule 22)."""
        with transaction(self._pool) as connection:
            due = objects.list_sweeps(connection)
        for each in due:
            reappeared = self._artifacts.exists(each.object_name)
            if reappeared:
                log.warning("artifact.reappeared", object_name=each.object_name)
                self._artifacts.delete(each.object_name)
            with transaction(self._pool) as connection:
                objects.mark_swept(connection, each.object_name)
                if reappeared:
                    events.append(
                        connection,
                        EventKind.ARTIFACT_REAPPEARED,
                        object_name=each.object_name,
                        digest=each.digest,
                    )

    def remove_strays(self) -> list[str]:
        """Delete objects that no row allows and that are older than any write under way; returns their names.

        Of two that belong together, object and key, the one that lost the other goes, too.
        """
        there = self._artifacts.names(older_than=ABANDONED_SECONDS)
        with transaction(self._pool) as connection:
            known = objects.list_names(connection)
        strays = [name for name in there if name not in known and not self._is_ledgers(name)]
        for name in strays:
            log.warning("artifact.stray", object_name=name)
            self._artifacts.delete(name)
        if keys := self._artifacts.destroy_stray_keys(known, older_than=ABANDONED_SECONDS):
            log.warning("artifact.stray_keys", keys=keys)
        return strays

    def _is_ledgers(self, name: str) -> bool:
        return is_ledger_file(name) and self._artifacts.opens(name)
