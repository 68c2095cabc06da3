"""The relay: the state tables are the outbox. Whatever waits is rung again until its state says that it was heard."""

import time

from service.store import gates, work
from service.store.database import Pool, transaction
from workers.bell import Bell

QUIET_SECONDS = 2.0
"""How long an item that was rung may take to change its state before it is rung again."""


class Relay:
    """One look at a time, at the caller's pace; any number of relays may run.

    A queue that has not been emptied since the last round is not filled further.
    """

    def __init__(self, pool: Pool, bell: Bell) -> None:
        """Rings `bell` for what `pool`'s tables say is waiting."""
        self._pool = pool
        self._bell = bell
        self._rung: dict[tuple[str, tuple[int | str, ...]], float] = {}

    def look(self) -> int:
        """Ring for everything that waits; returns how many bells were rung."""
        with transaction(self._pool) as connection:
            to_train = work.count_to_train(connection)
            waiting: list[tuple[str, tuple[int | str, ...]]] = [
                *(("targets.plan", (model_id,)) for model_id in work.list_to_plan(connection)),
                *(("target.erase", (str(ref.request_id), ref.model_id)) for ref in work.list_to_erase(connection)),
                *(("target.certify", (str(ref.request_id), ref.model_id)) for ref in work.list_to_certify(connection)),
                *(("model.rebuild", (model_id,)) for model_id in work.list_to_rebuild(connection)),
                *(("model.publish", (model_id,)) for model_id in work.list_to_publish(connection)),
                *(("model.gate", (model_id,)) for model_id in gates.list_to_evaluate(connection)),
            ]
        now = time.monotonic()
        self._rung = {key: at for key, at in self._rung.items() if now - at < QUIET_SECONDS}
        rung = 0
        busy = any(task != "targets.plan" for task, _ in waiting) and self._bell.waiting("default") > 0
        for task, ids in waiting:
            if task == "targets.plan" or not (busy or (task, ids) in self._rung):
                self._bell.ring(task, *ids)
                self._rung[task, ids] = now
                rung += 1
        if to_train and self._bell.waiting("train") == 0:
            self._bell.ring("stages.train")
            rung += 1
        return rung
