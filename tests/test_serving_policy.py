"""`min_shards`: with fewer live shards a model says so instead of answering; declared, changed, followed at once."""

from pathlib import Path

import pytest
from api_client import Api, Run
from conftest import Database
from serving_kit import Toy, serving, wait_until
from serving_talk import TALK, Talker, complete

from service.domain.errors import NotFoundError
from service.serving import lease
from service.store import models, policies
from service.store.api_keys import Scope

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration


def demand(toy: Toy, shards: int) -> None:
    with toy.connect() as connection:
        policies.set_min_shards(connection, toy.name, shards, actor="test")


def test_below_min_shards_nothing_is_answered_and_why_is_said(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE_POLL", 60.0)

    class Engine(Talker):
        pass

    toys = {}
    for name, recipe in (("toy", None), ("talker", TALK)):
        toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", name=name)
        toy.recipe = recipe or toy.recipe
        toy.create()
        toy.add_toy_stage("a", 1.0, shard=0)
        toy.add_toy_stage("b", -3.0, shard=1)
        toy.publish("a", "b", cause="train")
        demand(toy, 2)
        toys[name] = toy
    toy, talker = toys["toy"], toys["talker"]
    with serving(toy, factory=Engine, settings=toy.settings(lease_ttl_ms=80_000)) as (client, _):
        wait_until(lambda: len(client.get("/readyz").json()["models"]) == 2 and client.ready())
        assert client.predict().status_code == 200
        for each in toys.values():
            each.publish("a", None, taint=1)
            wait_until(lambda each=each: each.leases()[0]["covers"] == 2)
        answer = client.predict()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["type"] == "urn:expunge:problem:too-few-shards"
        assert "1 of 2 shards are live and min_shards is 2" in answer.json()["detail"]
        assert "/v1/models/toy/capacity" in answer.json()["detail"]
        assert client.get("/v2/models/toy/ready").status_code == 503
        refused = client.post("/v1/completions", json={"model": "talker", "prompt": "a", "stream": True})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too-few-shards")
        for each in toys.values():
            demand(each, 1)  # heard by NOTIFY: a heartbeat comes every twenty seconds
        wait_until(lambda: client.predict().status_code == 200, seconds=10)
        assert client.predict().json()["shards"] == {"live": 1, "of": 2}
        assert client.get("/v2/models/toy/ready").status_code == 200
        client.toy = talker
        wait_until(lambda: complete(client, max_tokens=1).json().get("shards") == {"live": 1, "of": 2}, seconds=10)


def test_a_change_is_an_event_and_none_is_none(database: Database, tmp_path: Path) -> None:
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts")
    toy.create()
    demand(toy, 2)
    demand(toy, 2)
    assert toy.events("model.min_shards_changed") == [{"actor": "test", "min_shards": 2}]
    with toy.connect() as connection:
        assert models.get_model(connection, toy.name).min_shards == 2
        with pytest.raises(NotFoundError):
            policies.set_min_shards(connection, "nothing", 2, actor="test")


def test_min_shards_are_declared_shown_and_changed(api: Api) -> None:
    api.dataset()
    api.model(min_shards=2)
    url = "/v1/models/sentiment"
    assert api.client.get(url).json()["min_shards"] == 2
    changed = api.client.patch(url, json={"min_shards": 1})
    assert changed.status_code == 200, changed.text
    assert (changed.json()["min_shards"], changed.json()["rebuild"]) == (1, {"kind": "now"})
    both = api.client.patch(url, json={"min_shards": 2, "rebuild": {"kind": "by_deadline"}})
    assert (both.json()["min_shards"], both.json()["rebuild"]) == (2, {"kind": "by_deadline"})
    assert api.client.patch(url, json={"rebuild": {"kind": "now"}}).json()["min_shards"] == 2
    for wrong in ({}, {"min_shards": 0}, {"min_shards": 3}, {"min_shards": 1.5}, {"min_shards": None}):
        answer = api.client.patch(url, json=wrong)
        assert answer.status_code == 422, wrong
        assert "min_shards" in answer.text
    half = {"min_shards": 1, "rebuild": {"kind": "spares", "spares": 9}}
    assert api.client.patch(url, json=half).status_code == 422
    assert api.client.get(url).json()["min_shards"] == 2  # all or nothing
    assert api.client.patch("/v1/models/nothing", json={"min_shards": 1}).status_code == 404
    reader = api.with_scopes(Scope.DELETION_READ)
    assert reader.patch(url, json={"min_shards": 1}).status_code == 403


def test_the_command_line_sets_it(api: Api, run: Run) -> None:
    api.dataset()
    api.model()
    code, out, _ = run("model", "min-shards", "sentiment", "2")
    assert code == 0
    assert "answers with 2 live shards or more" in out
    assert api.client.get("/v1/models/sentiment").json()["min_shards"] == 2
    assert run("model", "min-shards", "sentiment", "9")[0] != 0
