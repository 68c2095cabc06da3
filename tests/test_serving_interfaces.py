"""The model server's other protocols: Open Inference Protocol v2, and OpenAI's completions and models."""

import base64
import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Database
from serving_kit import RECIPE, Client, Plain, Toy, ToyEngine, serving, wait_until
from serving_talk import TALK, Heard, Talker, complete
from tiny import tiny_records
from tiny_kinds import KINDS

from service.store import api_keys
from shards.assembly import Assembly, Member
from shards.digest import sha256_hex
from shards.engine.completion import Sampling
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble
from shards.engine.registry import open_reader, open_trainer
from shards.logits import Logits
from shards.recipe import Module, Recipe, Scale
from shards.stages import chain

pytestmark = pytest.mark.integration
INFER = "/v2/models/toy/infer"


def make(database: Database, directory: Path, recipe: Recipe = RECIPE) -> Toy:
    toy = Toy(database.owner_url, database.app_url, directory / "artifacts", recipe=recipe)
    toy.create()
    toy.add_toy_stage("a", 1.0, shard=0)
    toy.add_toy_stage("b", -3.0, shard=1)
    toy.publish("a", "b", cause="train")
    return toy


@pytest.fixture
def client(database: Database, tmp_path: Path) -> Iterator[Client]:
    toy = make(database, tmp_path)
    with serving(toy, settings=toy.settings(record_limit_bytes=100)) as (found, _):
        yield found


@pytest.fixture
def talker(database: Database, tmp_path: Path) -> Iterator[Client]:
    class Engine(Talker):
        pace = 0.001

    toy = make(database, tmp_path, TALK)
    with serving(toy, factory=Engine, settings=toy.settings(record_limit_bytes=100)) as (found, _):
        yield found


def tensor(*texts: Any, **changes: Any) -> dict[str, Any]:
    fields = {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return {"inputs": [fields | changes]}


# Open Inference Protocol


def test_the_server_and_its_models_describe_themselves(client: Client) -> None:
    assert client.get("/v2").json()["name"] == "expunge"
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/toy/ready").json() == {"ready": True, "name": "toy"}
    assert client.get("/v2/models/toy/versions/1/ready").status_code == 200
    assert client.get("/v2/models/toy/versions/2/ready").status_code == 503
    found = client.get("/v2/models/toy").json()
    assert found["versions"] == ["1"]
    assert found["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    assert found["outputs"] == [
        {"name": "label", "datatype": "BYTES", "shape": [-1]},
        {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]},
    ]
    assert found["parameters"] == {"classes": ["no", "yes"], "shards_live": 2, "shards_of": 2}


def test_inference_says_what_predict_says(client: Client) -> None:
    answer = client.post(INFER, json=tensor("first", "second") | {"id": "mine", "parameters": {"any": 1}})
    assert answer.status_code == 200
    assert (answer.headers["x-expunge-version"], answer.headers["cache-control"]) == ("1", "no-store")
    body = answer.json()
    assert (body["model_name"], body["model_version"], body["id"]) == ("toy", "1", "mine")
    assert body["parameters"] == {"shards_live": 2, "shards_of": 2}
    label, shares = body["outputs"]
    assert label == {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["no", "no"]}
    assert shares == {
        "name": "probabilities",
        "datatype": "FP32",
        "shape": [2, 2],
        "data": [0.731059, 0.268941] * 2,
    }
    predicted = client.predict("first", "second").json()["outputs"]
    assert [share for each in predicted for share in each["probabilities"].values()] == shares["data"]
    rows = client.post(INFER, json=tensor(["a"], ["b"], shape=[2, 1]) | {"outputs": [{"name": "label"}]})
    assert [each["name"] for each in rows.json()["outputs"]] == ["label"]
    assert "id" not in rows.json()
    assert client.post("/v2/models/toy/versions/1/infer", json=tensor("a")).status_code == 200


def test_only_the_served_version_answers(client: Client) -> None:
    for path in ("/versions/2/infer", "/versions/01/infer", "/versions/x/infer"):
        answer = client.post("/v2/models/toy" + path, json=tensor("a"))
        assert answer.status_code == 404
        assert "version 1 is" in answer.json()["error"]
    assert client.get("/v2/models/toy/versions/2").status_code == 404
    before = "/v2/models/toy/versions/1/infer"
    assert client.post(before, json=tensor("a")).status_code == 200
    client.toy.publish("a", None, taint=1)
    wait_until(lambda: client.version() == 2)
    assert client.post(before, json=tensor("a")).status_code == 404
    answer = client.post(INFER, json=tensor("a"))
    assert answer.json()["parameters"] == {"shards_live": 1, "shards_of": 2}
    late = client.post(INFER, json=tensor("a"), headers={"x-expunge-min-version": "3"})
    assert (late.status_code, late.headers["retry-after"]) == (503, "1")
    assert client.post(INFER, json=tensor("a"), headers={"x-expunge-min-version": "x"}).status_code == 400


def test_what_is_no_inference_is_refused_in_the_protocols_own_words(client: Client) -> None:
    for body, status in (
        (b"", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (tensor(), 400),
        (tensor(*["a"] * 257), 400),
        (tensor("a") | {"more": 1}, 400),
        (tensor("a") | {"id": 7}, 400),
        (tensor("a") | {"outputs": [{"name": "logits"}]}, 400),
        (tensor("a") | {"outputs": ["label"]}, 400),
        ({"inputs": tensor("a")["inputs"] * 2}, 400),
        ({"inputs": [["a"]]}, 400),
        (tensor("a", name="input"), 400),
        (tensor("a", datatype="FP32"), 400),
        (tensor("a", shape=[2]), 400),
        (tensor("a", shape=[1, 1, 1]), 400),
        (tensor("a", shape=[-1, -1]), 400),
        (tensor("a", shape=[True]), 400),
        (tensor("a", shape=[]), 400),
        (tensor("a", "b", shape=[1, 2]), 400),
        (tensor(1), 400),
        (tensor([[[[[[[[["a"]]]]]]]]]), 400),
        (tensor("\ud800"), 400),
        (tensor("a" * 101), 413),
        (b" " * (4 * 2**20 + 1), 413),
    ):
        answer = client.post(INFER, content=body if isinstance(body, bytes) else json.dumps(body).encode())
        assert answer.status_code == status, (body, answer.text)
        assert set(answer.json()) == {"error"}
        assert answer.headers["content-type"] == "application/json"


def test_other_refusals_have_the_same_form(client: Client) -> None:
    for answer, status in (
        (client.post("/v2/models/other/infer", json=tensor("a")), 404),
        (client.get("/v2/models/other"), 404),
        (client.get("/v2/nothing"), 404),
        (client.get(INFER), 405),
        (client.post(INFER, json=tensor("a"), headers={"authorization": ""}), 401),
        (client.get("/v2/models/toy", headers={"authorization": ""}), 401),
        (client.post(INFER, json=tensor("a"), headers={"inference-header-content-length": "9"}), 400),
    ):
        assert (answer.status_code, set(answer.json())) == (status, {"error"})
    text = client.get("/metrics").text
    assert 'expunge_predictions_total{model="toy",result="invalid-body"} 1.0' in text


class Numbers(ToyEngine):
    """Answers the sum of a vector, or an image's number of bytes."""

    def build(self, assembly: Assembly) -> Any:
        super().build(assembly)

        class Predictor(Plain):
            def logits(self, inputs: Sequence[Any]) -> Logits:
                found = [[len(each) if isinstance(each, bytes) else sum(json.loads(each))] for each in inputs]
                return np.array(found, np.float32)

        return Predictor()


def test_vectors_are_numbers_and_regressions_values(database: Database, tmp_path: Path) -> None:
    module = Module(path="somewhere:Net", digest="0" * 64, width=3)
    recipe = Recipe(engine="sisa", module=module, task="regression", input="vector", shards=2, slices=2)
    with serving(make(database, tmp_path, recipe), factory=Numbers) as (client, _):
        found = client.get("/v2/models/toy").json()
        assert found["inputs"] == [{"name": "vector", "datatype": "FP32", "shape": [-1, 3]}]
        assert found["outputs"] == [{"name": "value", "datatype": "FP32", "shape": [-1, 1]}]

        def infer(*data: Any, **changes: Any) -> Any:
            fields = {"name": "vector", "datatype": "FP32", "shape": [2, 3]} | changes
            body = json.dumps(tensor(*data, **fields))
            return client.post(INFER, content=body)

        for data in ((1, 2, 3.5, 4, 5, 6), ([1, 2, 3.5], [4, 5, 6])):
            (value,) = infer(*data).json()["outputs"]
            assert value == {"name": "value", "datatype": "FP32", "shape": [2, 1], "data": [6.5, 15.0]}
        assert infer(1, 2, 3, shape=[3]).status_code == 400
        assert infer(1, 2, shape=[1, 2]).status_code == 400
        assert infer(1, 2, "3", shape=[1, 3]).status_code == 400
        assert infer(*(1, 2, True), shape=[1, 3]).status_code == 400
        assert infer(1, 2, float("nan"), shape=[1, 3]).status_code == 400
        assert infer(1, 2, 3, shape=[1, 3], datatype="INT32").status_code == 400
        assert infer(1, 2, 1e39, shape=[1, 3]).status_code == 400  # finite, but not as FP32
        assert infer(1, 2, 10**400, shape=[1, 3]).status_code == 400
        assert "[n, 3]" in infer(1, 2, 3, 4, shape=[1, 4]).json()["error"]
        assert '"vector"' in client.post(INFER, json=tensor("a")).json()["error"]


def test_values_are_rounded_on_the_declared_scale(database: Database, tmp_path: Path) -> None:
    """What is measured in nanometres is not 0.0 for want of places."""
    recipe = dataclasses.replace(RECIPE, input="image", task="regression", classes=(), scale=Scale(spread=2e-9))

    class Small(Numbers):
        def build(self, assembly: Assembly) -> Any:
            inner = super().build(assembly)

            class Predictor(Plain):
                def logits(self, inputs: Sequence[Any]) -> Logits:
                    return inner.logits(inputs) * np.float32(1.23456789012e-10)

            return Predictor()

    with serving(make(database, tmp_path, recipe), factory=Small) as (client, _):
        image = base64.b64encode(bytes(1)).decode()
        found = client.post(INFER, json=tensor(image, name="image")).json()["outputs"][0]["data"]
        assert found == [1.23457e-10]
        answer = client.post("/v1/models/toy/predict", json={"inputs": [{"image": image}]})
        assert answer.json()["outputs"] == [{"value": 1.23457e-10}]


def test_images_come_as_base64(database: Database, tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, input="image", task="regression", classes=())
    with serving(make(database, tmp_path, recipe), factory=Numbers) as (client, _):
        body = tensor(base64.b64encode(bytes(7)).decode(), name="image")
        assert client.post(INFER, json=body).json()["outputs"][0]["data"] == [7.0]
        assert "base64" in client.post(INFER, json=tensor("not base64", name="image")).json()["error"]
        assert client.post(INFER, json=tensor("\u00e9", name="image")).status_code == 400


# OpenAI


def test_a_completion_is_whole_or_streamed(talker: Client) -> None:
    answer = complete(talker, prompt="say it now", max_tokens=3)
    assert (answer.headers["x-expunge-version"], answer.headers["cache-control"]) == ("1", "no-store")
    body = answer.json()
    assert (body["object"], body["model"], body["id"][:5]) == ("text_completion", "toy", "cmpl-")
    assert body["system_fingerprint"] == answer.headers["x-expunge-assembly"]
    assert (body["version"], body["shards"]) == (1, {"live": 2, "of": 2})
    assert body["choices"] == [{"index": 0, "text": "-1;" * 3, "logprobs": None, "finish_reason": "length"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    stream = Heard(talker, max_tokens=5, stream_options={"include_usage": True}).join()
    assert (stream.status, stream.version, stream.words) == (200, 1, ["-1"] * 5)
    assert (stream.done, stream.whole, stream.usage["completion_tokens"]) == (True, True, 5)
    assert len(complete(talker).json()["choices"][0]["text"]) == 3 * 16  # tokens, unless it says more
    lenient = {"n": 1, "temperature": 0, "top_p": 1, "logprobs": None, "echo": False, "user": "u", "stop": ["x"]}
    assert complete(talker, prompt=["one"], seed=7, **lenient).status_code == 200


def test_what_cannot_be_completed_is_refused_by_name(talker: Client) -> None:
    for changes, named in (
        ({"model": None}, "model"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": 1}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"n": 2}, "n "),
        ({"echo": True}, "echo"),
        ({"logprobs": 0}, "logprobs"),
        ({"made up by a caller": 1}, "a field"),
    ):
        body = json.dumps({"model": "toy", "prompt": "say it"} | changes)
        answer = talker.post("/v1/completions", content=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), changes
        assert error["message"].startswith(named)
        assert set(error) == {"message", "type", "param", "code"}


def test_completions_are_refused_in_the_protocols_own_words(talker: Client) -> None:
    def code(answer: Any) -> tuple[int, str]:
        return answer.status_code, answer.json()["error"]["code"]

    assert code(complete(talker, model="other")) == (404, "no-such-model")
    assert code(complete(talker, prompt="a" * 101)) == (413, "input-too-large")
    assert code(talker.post("/v1/completions", content=b" " * (4 * 2**20 + 1))) == (413, "body-too-large")
    assert code(talker.post("/v1/completions", content=b"{")) == (400, "malformed-json")
    assert code(talker.post("/v1/completions", content=b"[]")) == (400, "invalid-body")
    assert code(talker.get("/v1/completions")) == (405, "method-not-allowed")
    body = {"model": "toy", "prompt": "a", "stream": True}
    late = {"x-expunge-min-version": "2"}
    assert code(talker.post("/v1/completions", json=body, headers=late)) == (503, "version-too-low")
    assert code(talker.post("/v1/completions", json=body, headers={"authorization": ""})) == (401, "unauthorized")
    with talker.toy.connect() as connection:
        reader = api_keys.create(connection, "reader", [api_keys.Scope.AUDIT_READ])
    other = {"authorization": f"Bearer {reader}"}
    assert code(talker.post("/v1/completions", json=body, headers=other)) == (403, "forbidden")
    for answer in (talker.predict("a"), talker.post(INFER, json=tensor("a")), talker.get("/v2/models/toy")):
        assert answer.status_code == 501
        assert "/v1/completions" in answer.text


def test_models_are_listed(client: Client) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == ("toy", "model", "expunge")
    assert client.get("/v1/models/toy").json() == model
    assert client.get("/v1/models/other").json()["error"]["code"] == "no-such-model"
    assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
    answer = complete(client)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not-a-completer")
    assert "/v1/models/toy/predict" in answer.json()["error"]["message"]


@pytest.mark.golden
def test_a_real_causal_language_model_completes(database: Database, tmp_path: Path) -> None:
    prepare()
    kind = next(kind for kind in KINDS if kind.name == "llama-lm")
    recipe = kind.recipe(kind.save(tmp_path / "lm"), shards=2)
    trainer = open_trainer(recipe)
    reader = open_reader(recipe, trainer=trainer)
    toy = Toy(database.owner_url, database.app_url, tmp_path / "artifacts", recipe=recipe)
    toy.create()
    members: list[Member] = []
    for shard, name in enumerate("ab"):
        stage = chain(recipe.digest, shard, (0,), {0: f"{shard}" * 64})[0]
        records = [dataclasses.replace(each, label="w5 w6 w7 w8") for each in tiny_records(4, name)]
        data = trainer.train(stage, records, [])
        reader.load(sha256_hex(data), data)
        members.append(Member(stage.key, (0,), (sha256_hex(data),)))
        toy.add_stage(name, shard=shard, data=data, key=stage.key)
    toy.publish("a", "b", cause="train")

    def said(*live: Member | None, **wishes: Any) -> str:
        ensemble = reader.build(Assembly(recipe.digest, live))
        assert isinstance(ensemble, Ensemble)
        return "".join(step.text for step in ensemble.complete("w1 w2", Sampling(max_new_tokens=8, **wishes)))

    with serving(toy, factory=partial(open_reader, device="cpu")) as (client, _):
        asked = {"prompt": "w1 w2", "max_tokens": 8}
        hot = complete(client, temperature=1, seed=3, **asked).json()
        assert hot["choices"][0]["text"] == said(*members, temperature=1.0, seed=3)
        body = complete(client, **asked).json()
        assert body["choices"][0]["text"] == said(*members)
        assert body["usage"]["prompt_tokens"] == 3  # the start token is one
        stream = Heard(client, **asked).join()
        assert (stream.done, "".join(stream.words)) == (True, said(*members))
        version = toy.publish("a", None, taint=1)
        wait_until(lambda: toy.leases()[0]["freed"] == version)
        assert complete(client, **asked).json()["choices"][0]["text"] == said(members[0], None)
