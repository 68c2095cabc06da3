"""Engines `sisa` and `external` through the workers and the API: train, publish, delete, certify, rebuild."""

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_client import RECIPE, Api
from conftest import Database
from test_engine_external import COMMAND, COMMANDS
from test_replays import age, drawn, replayed
from test_workers_path import SUBJECTS, build, served, settle
from tiny import tiny_backbone, tiny_record
from world import World, make_world

from service.domain.replays import ReplayOutcome
from service.evidence.verify import verify
from service.serving.answers import ProblemError, check_inputs
from service.settings import Settings
from service.store import datasets, models, preview
from service.store.database import transaction
from shards.assembly import Assembly
from shards.engine.registry import open_reader
from shards.partition import dataset_key, record_id_of
from shards.recipe import Module, Recipe
from workers import steps
from workers.training import train_queued

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration


@pytest.fixture
def installation(database: Database, tmp_path: Path) -> Iterator[Callable[[str], World]]:
    made: list[World] = []

    def make(mode: str) -> World:
        world = make_world(database, tmp_path, None, engine="external", command=mode, orders=1)  # type: ignore[arg-type]
        settings = Settings(**(world.context.settings.model_dump() | {"commands": COMMANDS}))
        object.__setattr__(world.context, "settings", settings)
        world.add(SUBJECTS)
        made.append(world)
        return world

    yield make
    for world in made:
        world.pool.close()


def delete(world: World, subject: str) -> dict[str, Any]:
    """Delete a person; the certificate's predicate, checked."""
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    settle(world)
    (envelope,) = world.row("SELECT envelope FROM certificate WHERE request_id = %s", request_id)
    checks = verify(envelope, world.public_key, artifacts=world.context.artifacts.files.root)
    assert [check for check in checks if not check.passed] == []
    return json.loads(base64.b64decode(envelope["payload"]))["predicate"]


@pytest.mark.parametrize(("mode", "reproducible"), [("good", True), ("noisy", False)])
def test_what_is_claimed_depends_on_training_twice(
    installation: Callable[[str], World], mode: str, reproducible: bool
) -> None:
    world = installation(mode)
    build(world)
    assert served(world)[2] == (2, 2)
    with transaction(world.pool) as connection:
        assert models.get_model_by_id(connection, world.model_id).reproducible is reproducible
    ((body,),) = world.rows("SELECT body FROM event_pending WHERE kind = 'model.reproducible'")
    assert len(body["digests"]) == (1 if reproducible else 2)
    said = delete(world, "person2")
    made = {claim["claim"] for claim in said["claims"]}
    assert made == {"influence-free", "deactivated", "erased"} | ({"retrain-equal"} if reproducible else set())
    assert ("retrain_equal_not_claimed" in {item["code"] for item in said["open_items"]}) is not reproducible
    assert (said["model"]["backbone"], said["model"]["provenance"]) == (None, None)
    assert "own training command" in said["method"]
    build(world)
    assert served(world)[2] == (2, 2)
    with transaction(world.pool) as connection:  # a difference is never undone, equality can be
        assert models.mark_reproducible(connection, world.model_id, found=True) is False
        assert models.mark_reproducible(connection, world.model_id, found=False) is reproducible


@pytest.mark.parametrize(("mode", "outcome"), [("good", ReplayOutcome.EQUAL), ("noisy", ReplayOutcome.SKIPPED)])
def test_a_replay_runs_the_command_only_where_something_is_claimed(
    installation: Callable[[str], World], mode: str, outcome: ReplayOutcome
) -> None:
    world = installation(mode)
    build(world)
    age(world)
    (replay_id,) = drawn(world)
    verdict = replayed(world, replay_id)
    assert verdict is not None
    assert (verdict.outcome, verdict.reason) == (outcome, "NotReproducible" if mode == "noisy" else None)
    assert served(world)[2] == (2, 2)


def test_a_command_that_differs_later_loses_the_claim(
    installation: Callable[[str], World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_PIDS", str(tmp_path / "drifted"))
    world = installation("drift")
    build(world)
    with transaction(world.pool) as connection:
        assert models.get_model_by_id(connection, world.model_id).reproducible is True
    (tmp_path / "drifted").touch()
    age(world)
    verdict = replayed(world, drawn(world)[0])
    assert verdict is not None
    assert verdict.outcome is ReplayOutcome.MISMATCH
    with transaction(world.pool) as connection:
        assert models.get_model_by_id(connection, world.model_id).reproducible is False
    told = [
        body["digests"] for (body,) in world.rows("SELECT body FROM event_pending WHERE kind = 'model.reproducible'")
    ]
    assert [len(digests) for digests in told] == [1, 2]


def test_a_failing_command_is_a_failed_job_without_its_words(
    installation: Callable[[str], World], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    world = installation("fail")
    steps.rebuild_model(world.context, world.model_id)
    for _ in range(3):
        train_queued(world.context)
        world.rest()
    found = world.rows("SELECT DISTINCT state, error FROM stage_job WHERE attempts > 0")
    words = "CommandError: command: fail ended with exit code 3; run it by hand on a job file of made-up records"
    assert ("failed", words) in found
    told = caplog.text + "".join(capfd.readouterr()) + str(world.rows("SELECT body FROM event_pending"))
    assert "w1 " not in told
    assert "record_id" not in told
    with transaction(world.pool) as connection:
        assert models.get_model_by_id(connection, world.model_id).reproducible is None


@pytest.fixture
def sisa(database: Database, tmp_path: Path) -> Iterator[World]:
    backbone = tiny_backbone(tmp_path / "backbone", layers=1, width=16)
    world = make_world(database, tmp_path, backbone, engine="sisa", orders=1)
    world.add(SUBJECTS)
    yield world
    world.pool.close()


def answers(world: World, texts: list[str]) -> list[list[float]]:
    """What a model server answers from the published version's artefacts."""
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        found = models.find_version(connection, world.model_id, model.version)
    assert found is not None
    reader = open_reader(world.recipe)
    for name, digest in world.rows("SELECT object_name, digest FROM artifact WHERE state = 'live' AND kind = 'stage'"):
        reader.load(digest, world.context.artifacts.get(name))
    return reader.build(Assembly.from_json(found.body)).logits(texts).tolist()


def test_sisa_goes_the_whole_way_of_a_deletion(sisa: World) -> None:
    texts = ["w1 w2 w3", "w9", "w50 w51 w52 w53 w54 w55 w56"]
    build(sisa)
    version, before, depths = served(sisa)
    assert (version, depths) == (1, (2, 2))
    first = answers(sisa, texts)
    said = delete(sisa, "person2")
    assert said["method"] == "stage deactivation and destruction (SISA)"
    assert {claim["claim"] for claim in said["claims"]} == {"influence-free", "retrain-equal", "deactivated", "erased"}
    version, after, depths = served(sisa)
    assert version == 2
    assert sum(depths) < 4
    if any(depths):
        assert answers(sisa, texts) != first
    build(sisa)
    version, rebuilt, depths = served(sisa)
    assert (version, depths) == (3, (2, 2))
    assert len({before, after, rebuilt}) == 3
    assert sisa.row("SELECT canonical FROM model_version WHERE version = 3") == (True,)
    assert answers(sisa, texts) != first


def test_the_previewed_accuracy_of_sisa_is_the_one_then_served(sisa: World) -> None:
    people = sisa.dataset
    with transaction(sisa.pool) as connection:
        sisa.dataset = datasets.insert_dataset(
            connection,
            name="evaluation",
            shards=1,
            slices=1,
            classes=list(sisa.recipe.classes),
            deletable=False,
            subject_row_cap=1000,
        )
        connection.execute("UPDATE model SET evaluation_id = %s", [sisa.dataset.dataset_id])
    names = [f"e{number}" for number in range(40)]
    sisa.add({name: [name] for name in names})
    sisa.dataset = people
    build(sisa)
    key = dataset_key(sisa.secrets.partition, people.dataset_id)
    with transaction(sisa.pool) as connection:
        model = models.get_model_by_id(connection, sisa.model_id)
        ids = [record_id_of(key, name) for name in SUBJECTS["person2"]]
        foreseen = preview.preview(connection, model, ids).measured(sisa.context.artifacts)
    labels = [tiny_record(name).label for name in names]

    def accuracy() -> float:
        found = np.array(answers(sisa, [tiny_record(name).text for name in names])).argmax(1)
        return float(np.mean([sisa.recipe.classes[at] == label for at, label in zip(found, labels, strict=True)]))

    assert foreseen.accuracy_before == accuracy()
    delete(sisa, "person2")
    assert foreseen.depth_after == list(served(sisa)[2])
    assert foreseen.accuracy_after == accuracy()


def test_a_module_that_is_not_there_is_a_failed_job(database: Database, tmp_path: Path) -> None:
    module = Module(path="no.such.thing:Net", digest="0" * 64, width=3)
    world = make_world(
        database,
        tmp_path,
        None,
        engine="sisa",
        orders=1,
        module=module,
        input="vector",  # type: ignore[arg-type]
    )
    try:
        world.add({"person": ["a"]})
        steps.rebuild_model(world.context, world.model_id)
        train_queued(world.context)
        [(error,)] = world.rows("SELECT DISTINCT error FROM stage_job WHERE attempts > 0")
        assert error.startswith("ModuleError: module.path: ")
    finally:
        world.pool.close()


def test_the_api_takes_names_of_allowed_commands_only(api: Api) -> None:
    api.dataset()
    recipe = {key: value for key, value in RECIPE.items() if key not in {"backbone", "orders"}}
    recipe |= {"engine": "external", "command": "rm"}
    answer = api.client.post("/v1/models", json={"name": "m", "dataset": "reviews", "recipe": recipe})
    assert (answer.status_code, answer.json()["field"]) == (422, "recipe.command")
    assert "EXPUNGE_COMMANDS" in answer.json()["detail"]
    api.settings.commands["mean"] = COMMAND
    recipe["command"] = "mean"
    api.dataset("evaluation", deletable=False)
    body = {"name": "m", "dataset": "reviews", "recipe": recipe}
    answer = api.client.post("/v1/models", json={**body, "evaluation_dataset": "evaluation"})
    assert (answer.status_code, answer.json()["field"]) == (422, "evaluation_dataset")
    assert api.client.post("/v1/models", json=body).status_code == 201
    assert api.client.get("/v1/models/m").json()["reproducible"] is None


@pytest.mark.parametrize(
    "text", ["[1, 2]", "[1, 2, 3, 4]", "[1, 2, NaN]", "[1, 2, 1e39]", f"[1, 2, 1{'0' * 400}]", "w1"]
)
def test_a_server_refuses_rows_of_another_width(text: str) -> None:
    module = Module(path="no.such.thing:Net", digest="0" * 64, width=3)
    recipe = Recipe(engine="sisa", module=module, input="vector", classes=("a", "b"), shards=1, slices=1)
    check_inputs(recipe, ["[1, 2, 3]"])
    with pytest.raises(ProblemError, match="invalid-input") as refusal:
        check_inputs(recipe, ["[1, 2, 3]", text])
    assert refusal.value.status == 422


def test_the_api_imports_no_module(api: Api) -> None:
    api.dataset("numbers", input="vector", width=3)
    recipe = {key: value for key, value in RECIPE.items() if key not in {"backbone", "orders"}}
    recipe |= {
        "engine": "sisa",
        "input": "vector",
        "module": {"path": "no.such.thing:Net", "digest": "0" * 64, "width": 3},
    }
    body = {"name": "m", "dataset": "numbers", "recipe": recipe}
    answer = api.client.post(
        "/v1/models", json={**body, "recipe": {**recipe, "module": {**recipe["module"], "width": 4}}}
    )
    assert (answer.status_code, "recipe.module.width" in answer.text) == (422, True)
    answer = api.client.post("/v1/models", json=body)
    assert answer.status_code == 201, answer.text
