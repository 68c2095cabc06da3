"""The lease SQL against the real Postgres: who is granted what, under which lock."""

import threading
import time
import uuid
from pathlib import Path

import psycopg
import pytest
from conftest import Database
from serving_kit import Toy

from service.store import barrier, leases
from service.store.database import connect
from service.store.leases import Beat

pytestmark = pytest.mark.integration


@pytest.fixture
def toy(database: Database, tmp_path: Path) -> Toy:
    found = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    found.create()
    found.add_toy_stage("a", 1.0, shard=0)
    found.add_toy_stage("b", -3.0, shard=1)
    found.publish("a", "b", cause="train")
    return found


def register(toy: Toy, covers: int, process_id: uuid.UUID | None = None) -> tuple[uuid.UUID, Beat]:
    process_id = process_id or uuid.uuid4()
    with psycopg.connect(toy.app_url) as connection:
        answer = leases.register(
            connection, process_id=process_id, model_id=toy.model_id, name="r", covers=covers, freed=0, ttl_ms=500
        )
    return process_id, answer


def beat(toy: Toy, process_id: uuid.UUID, covers: int) -> Beat:
    with psycopg.connect(toy.app_url) as connection:
        return leases.beat(connection, process_id=process_id, model_id=toy.model_id, covers=covers, freed=0)


def test_registering_below_the_floor_is_refused(toy: Toy) -> None:
    toy.publish("a", None)
    process_id, answer = register(toy, 1)
    assert answer == Beat(version=2, floor=2, granted=False)
    assert toy.leases() == []
    _, answer = register(toy, 2, process_id)
    assert answer.granted
    _, again = register(toy, 2, process_id)  # the reply to the commit was lost
    assert again.granted
    assert len(toy.events("replica.registered")) == 1


def test_a_late_heartbeat_is_refused_and_an_ended_row_says_so(toy: Toy) -> None:
    process_id, _ = register(toy, 1)
    assert beat(toy, process_id, 1) == Beat(1, 0, granted=True)
    toy.publish("a", None)
    assert beat(toy, process_id, 1) == Beat(2, 2, granted=False)
    with psycopg.connect(toy.app_url) as connection:
        assert barrier.declare(connection, toy.model_id, 2, expired={process_id: 1}) is not None
    assert beat(toy, process_id, 1) == Beat(2, 2, granted=False, ended=True)
    assert beat(toy, process_id, 2) == Beat(2, 2, granted=False, ended=True)
    assert beat(toy, uuid.uuid4(), 2).ended
    with psycopg.connect(toy.app_url) as connection:
        assert not leases.end(connection, process_id)
        leases.mark_freed(connection, process_id)
    assert toy.leases()[0]["freed_at"] is not None


def test_a_heartbeat_waits_for_a_publish_and_then_reads_the_new_floor(toy: Toy) -> None:
    process_id, _ = register(toy, 1)
    answers: list[Beat] = []
    with toy.connect() as publisher:
        publisher.execute("select from model where model_id = %s for no key update", (toy.model_id,))
        thread = threading.Thread(target=lambda: answers.append(beat(toy, process_id, 1)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()  # rule 5: one lock for the floor's read and the lease's write
        publisher.execute("update model set version = 2, floor = 2 where model_id = %s", (toy.model_id,))
    thread.join()
    assert answers == [Beat(2, 2, granted=False)]


def test_only_a_rise_of_covers_rings_the_barrier(toy: Toy) -> None:
    process_id, _ = register(toy, 1)
    toy.publish("a", None)
    with psycopg.connect(toy.app_url, autocommit=True) as listener:
        listener.execute("listen expunge_ack")
        beat(toy, process_id, 2)
        beat(toy, process_id, 2)
        heard = list(listener.notifies(timeout=0.3))
    assert [notice.payload for notice in heard] == [str(toy.model_id)]
    assert toy.events("replica.acknowledged") == [{"process_id": str(process_id), "covers": 2}]
    assert toy.leases()[0]["beats"] == 2


def test_tainted_stages_are_not_listed_and_come_back_when_lifted(toy: Toy) -> None:
    def listed() -> set[str]:
        with psycopg.connect(toy.app_url) as connection:
            return {stage.digest for stage in leases.list_clean_artifacts(connection, toy.model_id)}

    a, b = toy.stages["a"][1], toy.stages["b"][1]
    assert listed() == {a, b}
    toy.publish("a", None, taint=1)
    assert listed() == {a}
    with toy.connect() as connection:
        connection.execute("update tombstone set lifted_at = now()")
    assert listed() == {a, b}


def test_the_target_is_read_in_one_piece(toy: Toy) -> None:
    with psycopg.connect(toy.app_url) as connection:
        target = leases.get_target(connection, toy.model_id)
    assert (target.version, target.floor) == (1, 0)
    assert target.body is not None
    assert target.recipe == toy.recipe.to_json()


@pytest.mark.parametrize("call", ["heartbeat", "registration"])
def test_a_process_that_is_paused_in_its_transaction_delays_a_publish_by_half_a_lease(toy: Toy, call: str) -> None:
    process_id, _ = register(toy, 1)
    paused = connect(toy.app_url)
    if call == "heartbeat":
        assert leases.beat(paused, process_id=process_id, model_id=toy.model_id, covers=1, freed=0).granted
    else:
        values = {"process_id": uuid.uuid4(), "model_id": toy.model_id, "name": "r", "covers": 1, "freed": 0}
        assert leases.register(paused, **values, ttl_ms=500).granted
    started = time.monotonic()
    assert toy.publish("a", None) == 2
    assert time.monotonic() - started < 2  # of a lease of half a second
    with pytest.raises(psycopg.Error):
        paused.commit()
    paused.close()
    assert [row["beats"] for row in toy.leases()] == [0]


def test_what_is_told_is_durable_but_a_heartbeat(toy: Toy) -> None:
    """Rules 3 and 12, whatever the database's own setting is: that of the tests is off."""
    process_id = uuid.uuid4()
    values = {"process_id": process_id, "model_id": toy.model_id, "covers": 1, "freed": 0}
    with connect(toy.app_url) as connection:
        leases.register(connection, **values, name="r", ttl_ms=500)
        assert connection.execute("show synchronous_commit").fetchone() == ("on",)
        connection.commit()
        leases.beat(connection, **values)
        assert connection.execute("show synchronous_commit").fetchone() == ("off",)
        connection.commit()
        assert connection.execute("show synchronous_commit").fetchone() == ("on",)
