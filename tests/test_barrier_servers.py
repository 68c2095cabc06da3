"""What tells the barrier that Postgres may have lost something: a real one crashes, and is started again (rule 10)."""

import os
import signal
from pathlib import Path

import psycopg
import pytest
from conftest import running
from serving_kit import wait_until

from service.standalone.postgres import OWNER, Postgres, root_identity
from service.standalone.state import hold
from service.store import barrier, migrate
from service.store.barrier import Server
from service.store.database import connect

pytestmark = pytest.mark.integration


def answering(url: str) -> Server | None:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            return barrier.look(connection)[0]
    except psycopg.OperationalError:
        return None


def test_a_crash_moves_the_checkpoint_and_a_restart_the_start(tmp_path: Path) -> None:
    """A backend that is killed takes shared memory along, what was committed asynchronously too, and no postmaster."""
    with hold(tmp_path / "state") as state:
        server = Postgres(state.postgres, state.sockets, root_identity(), durable=False)
        server.initialize()
        url = server.url(OWNER, "postgres")
        with running(state, server.program()):
            migrate.upgrade(url)
            first = answering(url)
            assert first is not None
            with connect(url) as connection:
                assert barrier.is_still(connection, first)
                victim = connection.info.backend_pid
                os.kill(victim, signal.SIGKILL)
                wait_until(lambda: answering(url) not in {None, first}, seconds=30)
                with pytest.raises(psycopg.OperationalError):
                    connection.execute("select 1")
            crashed = answering(url)
            assert crashed is not None
            assert not crashed.is_another_than(first)
            assert crashed.checkpoint != first.checkpoint
            with connect(url) as connection:
                assert not barrier.is_still(connection, first)
        with running(state, server.program()):
            restarted = answering(url)
    assert restarted is not None
    assert restarted.is_another_than(crashed)
    assert (restarted.system_identifier, restarted.timeline) == (first.system_identifier, first.timeline)
