"""Every engine, task and policy through the running programs: HTTP in, trained, served, deleted, certified."""

import base64
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from installation import DONE, Installation, installation
from tiny import tiny_backbone
from tiny_kinds import KINDS, Kind

from service.cli.demo import stack
from shards.engine.modules import source_digest
from shards.recipe import Ridge

pytestmark = [pytest.mark.acceptance, pytest.mark.xdist_group("acceptance")]
HERE = Path(__file__).parent
VIT, LLAMA = (next(kind for kind in KINDS if kind.name == name) for name in ("vit", "llama-lm"))


@pytest.fixture(scope="module")
def expunge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    backbone = tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=3, width=16)
    clean = stack._environment
    ours = {
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "EXPUNGE_COMMANDS": json.dumps({"mine": [sys.executable, str(HERE / "toy_command.py"), "plain"]}),
    }
    with (
        mock.patch.object(stack, "_environment", return_value=clean() | ours),
        installation(tmp_path_factory.mktemp("home"), backbone) as made,
    ):
        yield made


def declare(
    expunge: Installation, name: str, dataset: dict[str, Any], recipe: dict[str, Any], lines: list[dict[str, Any]]
) -> None:
    """A dataset of its own, its records and a model that is not trained yet."""
    grid = {"shards": recipe["shards"], "slices": recipe["slices"], "classes": recipe.get("classes", [])}
    expunge.post("/v1/datasets", {"name": f"{name}-data", **grid, **dataset})
    body = "".join(json.dumps(line) + "\n" for line in lines)
    answer = expunge.http.post(f"/v1/datasets/{name}-data/records", content=body)
    assert answer.status_code == 201, answer.text
    expunge.post("/v1/models", {"name": name, "dataset": f"{name}-data", "recipe": recipe})


def line(subject: str, number: int, **payload: Any) -> dict[str, Any]:
    return {"record_id": f"{subject}-{number}", "subject": {"type": "user", "value": subject}, **payload}


def of_kind(kind: Kind, subject: str) -> dict[str, Any]:
    """A line with what a record of the kind holds."""
    record = kind.record(subject)
    given = {"image": base64.b64encode(record.image).decode()} if record.image else {"text": record.text}
    return line(subject, 0, label=record.label, **given)


def deleted(expunge: Installation, name: str, subject: str, directory: Path) -> int:
    """Delete a subject, look for it to be certified and rebuilt, and check the certificate; the version after."""
    request_id = expunge.ask(subject, [name])
    target = expunge.await_state(request_id, DONE)["targets"][0]
    expunge.await_state(request_id, {"completed"})
    rebuilt = expunge.await_built(name, more_than=target["version"])
    (newest, *_) = expunge.get(f"/v1/models/{name}/versions")["versions"]
    assert newest["canonical"]
    code, checks = expunge.certificate(request_id, name, directory)
    assert code == 0, [check for check in checks["checks"] if not check["passed"]]
    return rebuilt["version"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sisa", {"engine": "sisa", "orders": 1, "learning_rate": 1e-3}),
        ("ridge", {"engine": "ridge", "orders": 1, "ridge": Ridge(layers=2)}),
        ("merged", {"aggregation": "merged"}),
        ("score", {"task": "regression", "classes": ()}),
        ("ridgescore", {"engine": "ridge", "orders": 1, "ridge": Ridge(layers=2), "task": "regression", "classes": ()}),
    ],
)
def test_every_engine_from_training_to_certificate(
    expunge: Installation, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    expunge.make(name, subjects=16, evaluation=True, **changes)
    first = expunge.train(name)
    expunge.await_serving(name, first["version"])
    before = expunge.predict(0, name, "w1 w2").json()["outputs"]
    after_version = deleted(expunge, name, f"{name}2", tmp_path)
    expunge.await_serving(name, after_version)
    after = expunge.predict(1, name, "w1 w2").json()["outputs"]
    assert after[0].keys() == before[0].keys()
    assert after != before


def test_images_from_upload_to_certificate(expunge: Installation, tmp_path: Path) -> None:
    recipe = VIT.recipe(VIT.save(tmp_path / "vit"), shards=2).to_json()
    declare(expunge, "images", {"input": "image"}, recipe, [of_kind(VIT, f"image{n}") for n in range(16)])
    expunge.train("images")
    picture = {"image": of_kind(VIT, "unseen")["image"]}

    def ask(image: dict[str, str]) -> Any:
        return expunge.servers.post(f"{expunge.stack.servers[0]}/v1/models/images/predict", json={"inputs": [image]})

    before = expunge.until(lambda: answer.json() if (answer := ask(picture)).is_success else None, within=60)
    assert before["outputs"][0]["label"] in {"no", "yes"}
    assert ask({"image": base64.b64encode(b"no picture").decode()}).status_code == 422
    version = deleted(expunge, "images", "image3", tmp_path)
    after = expunge.until(lambda: a if (a := ask(picture).json()).get("version", 0) >= version else None, within=60)
    assert after["outputs"] != before["outputs"]


def test_completions_from_upload_to_certificate(expunge: Installation, tmp_path: Path) -> None:
    recipe = LLAMA.recipe(LLAMA.save(tmp_path / "llama"), shards=2).to_json()
    declare(expunge, "words", {"task": "completion"}, recipe, [of_kind(LLAMA, f"word{n}") for n in range(16)])
    first = expunge.train("words")
    url = f"{expunge.stack.servers[0]}/v1/completions"

    def ask() -> Any:
        return expunge.servers.post(url, json={"model": "words", "prompt": "w1 w2 w3", "max_tokens": 4})

    def at(version: int) -> Any:
        answer = ask()
        return answer.json() if int(answer.headers.get("X-Expunge-Version", 0)) >= version else None

    assert expunge.until(lambda: at(first["version"]), within=60)["usage"]["completion_tokens"] > 0
    version = deleted(expunge, "words", "word5", tmp_path)
    assert expunge.until(lambda: at(version), within=60)["choices"][0]["finish_reason"] in {"stop", "length"}
    body = {"model": "words", "prompt": "w1", "max_tokens": 4, "stream": True}
    with expunge.servers.stream("POST", url, json=body) as stream:
        assert [said for said in stream.iter_lines() if said][-1] == "data: [DONE]"


def test_a_module_of_the_users_own(expunge: Installation, tmp_path: Path) -> None:
    path = "toy_module:Normed"
    recipe = {
        "engine": "sisa",
        "input": "vector",
        "module": {"path": path, "digest": source_digest(path), "width": 3, "arguments": {"width": 3}},
        "classes": ["no", "yes"],
        "shards": 2,
        "slices": 2,
        "epochs": 2,
    }
    lines = [line(f"row{n}", 0, text=f"[{n}, {n % 3}, -0.5]", label=("no", "yes")[n % 2]) for n in range(16)]
    declare(expunge, "rows", {"input": "vector", "width": 3}, recipe, lines)
    first = expunge.train("rows")

    def ask() -> Any:
        answer = expunge.predict(0, "rows", "[1, 2, 3]")
        return answer.json() if answer.is_success and answer.json()["version"] >= first["version"] else None

    assert expunge.until(ask, within=60)["outputs"][0]["label"] in {"no", "yes"}
    assert expunge.predict(0, "rows", "[1, 2]").status_code == 422
    deleted(expunge, "rows", "row4", tmp_path)


def test_a_training_command_of_the_users_own(expunge: Installation, tmp_path: Path) -> None:
    recipe = {"engine": "external", "command": "mine", "classes": ["no", "yes"], "shards": 2, "slices": 2}
    lines = [line(f"own{n}", 0, text=f"w{n} w1", label=("no", "yes")[n % 2]) for n in range(16)]
    declare(expunge, "own", {}, recipe, lines)
    assert expunge.train("own")["reproducible"]
    deleted(expunge, "own", "own7", tmp_path)


def test_subjects_who_are_likely_to_leave_cost_no_depth(expunge: Installation, tmp_path: Path) -> None:
    prior = [{"name": "stays", "rate": 0.1, "slices": 2}, {"name": "leaves", "rate": 5, "slices": 1, "expires": True}]
    recipe = tiny(expunge, slices=3, orders=2, prior=prior)
    lines = [line(f"stays{n}", 0, text=f"w{n} w2", label=("no", "yes")[n % 2]) for n in range(18)]
    lines += [
        line(f"leaves{n}", 0, text=f"w{n} w3", label=("no", "yes")[n % 2], expires_at="2030-01-31") for n in range(8)
    ]
    priors = [{key: each[key] for key in each if key != "rate"} for each in prior]
    declare(expunge, "prior", {"priors": priors}, recipe, lines)
    expunge.train("prior")
    request_id = expunge.ask("leaves2", ["prior"])
    version = expunge.await_state(request_id, DONE)["targets"][0]["version"]
    versions = expunge.get("/v1/models/prior/versions")["versions"]
    depths = next(each["depths"] for each in versions if each["version"] == version)
    assert sorted(depths) == [2, 3], "the slice of those who leave is the last of every order"
    deleted(expunge, "prior", "stays4", tmp_path)


def tiny(expunge: Installation, **changes: Any) -> dict[str, Any]:
    """The tiny recipe with other fields, as JSON."""
    seed = len(json.dumps(changes)) + 1000
    return expunge.recipe(seed=seed).to_json() | changes


def test_rebuild_first_loses_no_depth(expunge: Installation, tmp_path: Path) -> None:
    expunge.make("first", subjects=16)
    trained = expunge.train("first")
    expunge.await_serving("first", trained["version"])
    assert expunge.http.patch("/v1/models/first", json={"rebuild": {"kind": "rebuild_first"}}).is_success
    request_id = expunge.ask("first3", ["first"])

    def waits() -> Any:
        found = expunge.request(request_id)
        return found if found["targets"][0]["deferred_until"] or found["state"] != "received" else None

    assert expunge.until(waits, within=20)["state"] == "received"
    target = expunge.await_state(request_id, DONE, within=120)["targets"][0]
    versions = expunge.get("/v1/models/first/versions")["versions"]
    assert [each["depths"] for each in versions] == [[2, 2]] * len(versions)
    assert next(each for each in versions if each["version"] == target["version"])["canonical"]
    expunge.await_state(request_id, {"completed"})
    code, checks = expunge.certificate(request_id, "first", tmp_path)
    assert code == 0, [check for check in checks["checks"] if not check["passed"]]


def test_a_lifted_restriction_serves_the_same_assembly(expunge: Installation) -> None:
    expunge.make("lifted", subjects=16)
    expunge.train("lifted")
    policy = {"rebuild": {"kind": "min_depth", "min_depth": 1}}
    assert expunge.http.patch("/v1/models/lifted", json=policy).is_success
    (before, *_) = expunge.get("/v1/models/lifted/versions")["versions"]
    subject = {"type": "user", "value": "lifted3"}
    body = {"subject": subject, "models": ["lifted"], "kind": "restrict"}
    request_id = expunge.post("/v1/deletion-requests", body, status=202)["request_id"]
    restricted = expunge.await_state(request_id, {"completed"})
    assert restricted["outcome"] == "restricted"
    (out, *_) = expunge.get("/v1/models/lifted/versions")["versions"]
    assert out["assembly"] != before["assembly"]
    expunge.post(f"/v1/deletion-requests/{request_id}/lift", {"reason_code": "resolved"}, status=202)
    (after, *_) = expunge.get("/v1/models/lifted/versions")["versions"]
    assert after["assembly"] == before["assembly"]
    expunge.await_serving("lifted", after["version"])
