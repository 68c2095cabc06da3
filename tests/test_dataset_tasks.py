"""Datasets of other tasks and inputs: what a line must hold, and that it comes back from the payload file as it was."""

import base64
import json
from typing import Any

import pytest
from api_client import Api

from service.store import payloads
from service.store.artifacts import open_artifacts

pytest_plugins = ["api_fixtures"]
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
        "0000000049454e44ae426082"
    )
).decode()
"""A PNG file of one red point."""
SUBJECT = {"type": "email", "value": "a@example.org"}


def declare(api: Api, **changes: Any) -> None:
    body = {"name": "data", "shards": 1, "slices": 1, **changes}
    answer = api.client.post("/v1/datasets", json=body)
    assert answer.status_code == 201, answer.text


def upload(api: Api, **line: Any) -> Any:
    body = json.dumps({"record_id": "r1", "subject": SUBJECT, **line})
    return api.client.post("/v1/datasets/data/records", content=body, headers={"Content-Type": "application/x-ndjson"})


@pytest.mark.parametrize(
    ("declared", "line"),
    [
        ({"task": "regression"}, {"text": "five stars", "label": "-4.50"}),
        ({"task": "completion"}, {"text": "Q: what?\nA:", "label": " that, over\nlines " * 40}),
        ({"input": "vector", "width": 3, "classes": ["a", "b"]}, {"text": "[0.5, -2, 1e3]", "label": "a"}),
        ({"input": "image", "task": "regression"}, {"image": PIXEL, "label": "7"}),
        ({"input": "image", "classes": ["a", "b"]}, {"image": PIXEL, "label": "b"}),
    ],
)
def test_a_line_comes_back_from_the_payload_file(api: Api, declared: dict[str, Any], line: dict[str, Any]) -> None:
    declare(api, **declared)
    answer = upload(api, **line)
    assert answer.status_code == 201, answer.text
    (name,) = open_artifacts(api.settings.artifact_url, api.settings.file_keys_url).names(older_than=-60)
    (stored,) = payloads.decode(open_artifacts(api.settings.artifact_url, api.settings.file_keys_url).get(name))
    assert stored.record.text == line.get("text", "")
    assert stored.record.label == line["label"]
    assert base64.b64encode(stored.record.image).decode() == line.get("image", "")


@pytest.mark.parametrize(
    ("declared", "line", "field"),
    [
        ({"task": "regression"}, {"text": "x", "label": "many"}, "label"),
        ({"task": "regression"}, {"text": "x", "label": "nan"}, "label"),
        ({"task": "regression"}, {"text": "x", "label": "1e400"}, "label"),
        ({"task": "regression"}, {"text": "x", "label": "\u0663"}, "label"),
        ({"task": "regression"}, {"label": "1"}, "text"),
        ({"task": "regression"}, {"text": "x", "image": PIXEL, "label": "1"}, "image"),
        ({"input": "vector", "width": 2, "classes": ["a", "b"]}, {"text": "[1, NaN]", "label": "a"}, "text"),
        ({"input": "vector", "width": 2, "classes": ["a", "b"]}, {"text": "[1, 2, 3]", "label": "a"}, "text"),
        ({"input": "vector", "width": 2, "classes": ["a", "b"]}, {"text": "[1, 1e39]", "label": "a"}, "text"),
        ({"input": "vector", "width": 1, "classes": ["a", "b"]}, {"text": "[true]", "label": "a"}, "text"),
        ({"input": "image", "classes": ["a", "b"]}, {"image": "not base64!", "label": "a"}, "image"),
        ({"input": "image", "classes": ["a", "b"]}, {"text": "x", "label": "a"}, "image"),
        ({"input": "image", "classes": ["a", "b"]}, {"image": PIXEL[:60], "label": "a"}, "image"),
        (
            {"input": "image", "classes": ["a", "b"]},
            {"image": base64.b64encode(b"GIF89a").decode(), "label": "a"},
            "image",
        ),
    ],
)
def test_a_line_that_does_not_fit_is_refused(
    api: Api, declared: dict[str, Any], line: dict[str, Any], field: str
) -> None:
    declare(api, **declared)
    answer = upload(api, **line)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == field if "errors" in answer.json() else field in answer.text
    assert "many" not in answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "regression", "classes": ["a", "b"]},
        {"task": "completion", "input": "image"},
        {"classes": ["a"]},
        {},
        {"input": "vector", "classes": ["a", "b"]},
    ],
)
def test_a_dataset_that_contradicts_itself_is_refused(api: Api, changes: dict[str, Any]) -> None:
    assert api.client.post("/v1/datasets", json={"name": "d", "shards": 1, "slices": 1, **changes}).status_code == 422


def test_task_and_input_of_recipe_and_dataset_must_agree(api: Api) -> None:
    declare(api, task="regression")
    recipe = {"backbone": {"source": "/x", "digest": "0" * 64}, "shards": 1, "slices": 1}
    body = {"name": "m", "dataset": "data", "recipe": {**recipe, "task": "completion"}}
    assert "recipe.task" in api.client.post("/v1/models", json=body).text
    body["recipe"] = {**recipe, "task": "regression", "scale": {"offset": 2.5, "spread": 2}}
    assert api.client.post("/v1/models", json=body).status_code == 201
