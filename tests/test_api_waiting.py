"""Held answers: given when the request is that far, and never on another's account."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from api_client import Api, serving
from serving_kit import wait_until

from service.api.waiting import BEFORE, Held, Until
from service.cli.request_commands import DEAD, PASSED
from service.domain.requests import State
from service.settings import Settings
from service.store import targets

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration

SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query = 'LISTEN expunge_request'"
)


class Asker:
    """Asks in threads, and knows when the API has begun to hold an answer."""

    def __init__(self, api: Api, begun: threading.Semaphore, pool: ThreadPoolExecutor) -> None:
        self.api, self.begun, self._pool = api, begun, pool

    def request(self) -> str:
        return self.api.request("ann@example.org").json()["request_id"]

    def ask(self, request_id: str, wait: str, client: httpx.Client | None = None) -> "Future[httpx.Response]":
        """A call whose answer is being held."""
        path = f"/v1/deletion-requests/{request_id}"
        asked = self._pool.submit((client or self.api.client).get, path, params={"wait": wait})
        assert self.begun.acquire(timeout=30)
        return asked

    def move(self, request_id: str, state: str, outcome: str | None = None) -> None:
        """What the workers do to a target and then to its request."""
        with self.api.database() as connection:
            connection.execute(
                "UPDATE request_target SET state = %s::deletion_state, outcome = %s, version = 1 WHERE request_id = %s",
                (state, outcome, request_id),
            )
            targets.refresh_requests(connection, [UUID(request_id)])

    def listens(self) -> bool:
        return self.api.scalar(SESSIONS) == 1

    def cut(self) -> None:
        """End the listener's session, and wait until it is gone."""
        query = SESSIONS.replace("count(*)", "pg_terminate_backend(pid, 10000)")
        assert self.api.scalar(query)

    def tell(self, payload: str) -> None:
        with self.api.database() as connection:
            connection.execute("SELECT pg_notify('expunge_request', %s)", (payload,))


@pytest.fixture
def asker(api: Api, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asker]:
    begun = threading.Semaphore(0)
    changed = Held.changed

    async def seen(self: Held) -> bool:
        begun.release()
        return await changed(self)

    monkeypatch.setattr(Held, "changed", seen)
    api.dataset()
    api.model()
    with ThreadPoolExecutor(4) as pool:
        found = Asker(api, begun, pool)
        wait_until(found.listens)
        yield found


def body(asked: "Future[httpx.Response]") -> dict[str, Any]:
    answer = asked.result()
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def patient(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> Asker:
    """Answers are held so long that a lost notification shows as the old state."""
    begin = Held.__init__

    def longer(self: Held, before: frozenset[State], _seconds: float) -> None:
        begin(self, before, 20)

    monkeypatch.setattr(Held, "__init__", longer)
    return asker


def test_an_answer_is_held_until_the_request_is_deactivated(patient: Asker) -> None:
    request_id, other = patient.request(), patient.request()
    asked, again = patient.ask(request_id, "deactivated"), patient.ask(other, "deactivated")
    patient.move(request_id, "deactivating")
    patient.move(other, "deactivated")
    assert body(again)["state"] == "deactivated"
    assert not asked.done()
    patient.move(request_id, "deactivated")
    assert body(asked)["state"] == "deactivated"


def test_completed_is_waited_for_through_the_states_before_it(patient: Asker) -> None:
    request_id = patient.request()
    first = patient.ask(request_id, "completed")
    patient.move(request_id, "deactivated")
    second = patient.ask(request_id, "completed")
    patient.move(request_id, "erasing")
    third = patient.ask(request_id, "completed")
    patient.move(request_id, "completed", "erased")
    assert [(body(each)["state"], body(each)["outcome"]) for each in (first, second, third)] == [
        ("completed", "erased")
    ] * 3


def test_a_request_that_failed_is_not_waited_for(patient: Asker) -> None:
    request_id = patient.request()
    asked = patient.ask(request_id, "completed")
    patient.move(request_id, "failed")
    assert body(asked)["state"] == "failed"
    path = f"/v1/deletion-requests/{request_id}"
    assert patient.api.client.get(path, params={"wait": "deactivated"}).json()["state"] == "failed"


def test_a_hint_is_not_believed(patient: Asker) -> None:
    request_id = patient.request()
    asked = patient.ask(request_id, "deactivated")
    for hint in (f"{request_id} completed", f"{request_id} a-state-of-a-later-release"):
        patient.tell(hint)
        assert patient.begun.acquire(timeout=30)  # read, and held again
    for noise in ("", " ", "nobody deactivated", str(uuid4())):
        patient.tell(noise)
    assert not asked.done()
    patient.move(request_id, "deactivated")
    assert body(asked)["state"] == "deactivated"


def test_what_changed_while_nobody_listened_is_seen_after_it(patient: Asker) -> None:
    request_id = patient.request()
    asked = patient.ask(request_id, "deactivated")
    with patient.api.database() as connection:  # the change and the cut in one: nobody is told
        connection.execute("UPDATE request_target SET state = 'deactivated', version = 1")
        connection.execute("UPDATE deletion_request SET state = 'deactivated'")
    patient.cut()
    assert body(asked)["state"] == "deactivated"
    wait_until(patient.listens)
    second = patient.request()
    asked = patient.ask(second, "deactivated")
    patient.move(second, "deactivated")
    assert body(asked)["state"] == "deactivated"


def test_an_answer_is_held_no_longer_than_asked_for(asker: Asker) -> None:
    path = f"/v1/deletion-requests/{asker.request()}"
    answer = asker.api.client.get(path, params={"wait": "completed", "seconds": "0.01"})
    assert (answer.status_code, answer.json()["state"]) == (200, "received")
    assert asker.begun.acquire(timeout=0)


def test_what_cannot_be_waited_for_is_said_at_once(asker: Asker) -> None:
    client = asker.api.client
    assert client.get(f"/v1/deletion-requests/{uuid4()}", params={"wait": "completed"}).status_code == 404
    path = f"/v1/deletion-requests/{asker.request()}"
    for wrong in ({"wait": "received"}, {"wait": "completed", "seconds": "0"}, {"wait": "completed", "seconds": "5"}):
        assert client.get(path, params=wrong).status_code == 422
    assert not asker.begun.acquire(timeout=0)


def test_held_answers_are_given_when_the_api_stops(asker: Asker, api_settings: Settings) -> None:
    with httpx.Client(headers=dict(asker.api.client.headers), timeout=30) as client:
        with serving(api_settings) as url:
            client.base_url = httpx.URL(url)
            asked = asker.ask(asker.request(), "completed", client)
        assert body(asked)["state"] == "received"


@pytest.mark.parametrize("until", Until)
def test_a_command_stops_asking_wherever_the_api_does_not_hold(until: Until) -> None:
    """Else it would ask again and again, without a pause."""
    assert BEFORE[until].isdisjoint(PASSED[until.value] | DEAD)
    assert BEFORE[until] | PASSED[until.value] | DEAD == set(State)
