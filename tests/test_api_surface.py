"""The API's edges: keys and scopes, problems, limits, health, figures, the doorbell."""

import json
import time
from pathlib import Path
from uuid import UUID

import httpx
import pytest
import redis
from api_client import RECIPE, Api, line, serving, write_keys
from key_store import file_keys

from service.api.doorbell import Doorbell, Task
from service.settings import Settings
from service.store import api_keys, subjects
from service.store.api_keys import Scope
from service.store.broker import broker_url
from service.store.database import make_pool, transaction
from service.store.secrets import Secrets, SecretsError, check_secrets, read_secrets

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration

ROUTES = [
    ("POST", "/v1/deletion-requests", Scope.DELETION_WRITE),
    ("POST", "/v1/deletion-requests:preview", Scope.AUDIT_READ),
    ("GET", "/v1/deletion-requests", Scope.DELETION_READ),
    ("GET", f"/v1/deletion-requests/{UUID(int=1)}", Scope.DELETION_READ),
    ("GET", f"/v1/deletion-requests/{UUID(int=1)}/events", Scope.AUDIT_READ),
    ("GET", f"/v1/deletion-requests/{UUID(int=1)}/certificate", Scope.AUDIT_READ),
    ("GET", f"/v1/deletion-requests/{UUID(int=1)}/certificate/supplements", Scope.AUDIT_READ),
    ("GET", f"/v1/deletion-requests/{UUID(int=1)}/inclusion-proof", Scope.AUDIT_READ),
    ("POST", f"/v1/deletion-requests/{UUID(int=1)}/retry", Scope.DELETION_APPROVE),
    ("GET", "/v1/audit/events", Scope.AUDIT_READ),
    ("GET", "/v1/audit/export?format=csv", Scope.AUDIT_READ),
    ("GET", "/v1/audit/log/checkpoint", Scope.AUDIT_READ),
    ("GET", "/v1/audit/log/tile/0/000", Scope.AUDIT_READ),
    ("POST", "/v1/datasets", Scope.DATA_WRITE),
    ("POST", "/v1/datasets/reviews/records", Scope.DATA_WRITE),
    ("POST", "/v1/models", Scope.MODEL_ADMIN),
    ("POST", "/v1/models/sentiment/rebuild", Scope.MODEL_ADMIN),
]


def test_every_call_needs_a_key_and_names_the_scope_it_lacks(api: Api) -> None:
    without = api.with_scopes()
    for method, path, scope in ROUTES:
        anonymous = httpx.request(method, api.url + path, json={})
        assert anonymous.status_code == 401, path
        assert anonymous.headers["WWW-Authenticate"].startswith("Bearer")
        refused = without.request(method, path, json={})
        assert refused.status_code == 403, path
        assert scope.value in refused.json()["detail"]
    for path in ("/v1/datasets", "/v1/models", "/v1/models/m/shards", "/v1/models/m/versions", "/v1/models/m"):
        assert httpx.get(api.url + path).status_code == 401


@pytest.mark.parametrize("token", ["x", "xp_", "xp_aaaaaaaa_" + "a" * 43, "xp_aaaaaaaa_" + "a" * 9999, "Bearer"])
def test_what_is_no_key_is_401(api: Api, token: str) -> None:
    answer = httpx.get(f"{api.url}/v1/datasets", headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401
    assert token in {"x", "xp_", "Bearer"} or token not in answer.text


def test_keys_are_kept_hashed_and_can_be_revoked(api: Api) -> None:
    with api.database() as connection:
        token = api_keys.create(connection, "one", [Scope.AUDIT_READ])
        prefix, secret = token[3:11], token[12:]
        assert len(secret) >= 32
        found = api_keys.authenticate(connection, token)
        assert found is not None
        assert (found.prefix, found.scopes) == (prefix, {Scope.AUDIT_READ})
        assert api_keys.authenticate(connection, token[:-1] + ("a" if token[-1] != "a" else "b")) is None
        assert api_keys.authenticate(connection, f"xp_{prefix}_{'a' * 43}") is None
        row = connection.execute("SELECT k::text FROM api_key k WHERE prefix = %s", (prefix,)).fetchone()
        assert row is not None
        assert secret not in row[0]
        api_keys.mark_revoked(connection, prefix)
        assert api_keys.authenticate(connection, token) is None


def test_the_first_key_is_made_once(api: Api) -> None:
    assert api_keys.bootstrap(api.settings.database_url) is None
    assert api.scalar("SELECT count(*) FROM api_key") == 1


def test_problems_are_problems_and_echo_nothing(api: Api) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (b"{", b"", b'{"a": secret}', b"\xff\xfe", b"[" * 60_000):
        answer = api.client.post("/v1/datasets", content=content, headers=headers)
        assert answer.status_code in {400, 422}, content[:10]
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "secret" not in answer.text
    missing = api.client.get("/v1/secret")
    assert (missing.status_code, missing.json()["status"]) == (404, 404)
    assert "secret" not in missing.text
    method = api.client.delete("/v1/datasets")
    assert method.status_code == 405
    assert "GET" in method.headers["Allow"] or "POST" in method.headers["Allow"]
    large = api.client.post("/v1/datasets", content=b" " * 600_000, headers=headers)
    assert large.status_code == 413
    chunked = api.client.post("/v1/datasets", content=(b" " * 10_000 for _ in range(60)), headers=headers)
    assert chunked.status_code == 413
    assert api.announce("/v1/datasets", 600_000) == 413
    assert api.client.get("/v1/datasets/%00").status_code == 404
    assert api.client.get("/v1/datasets").headers["Cache-Control"] == "no-store"


def test_datasets_are_declared_once(api: Api) -> None:
    api.dataset(subject_row_cap=5)
    taken = {"name": "reviews", "shards": 1, "slices": 1, "classes": ["a", "b"]}
    assert api.client.post("/v1/datasets", json=taken).status_code == 409
    shown = api.client.get("/v1/datasets").json()["datasets"]
    assert [(each["name"], each["subject_row_cap"], each["rows"]) for each in shown] == [("reviews", 5, 0)]
    for wrong in (
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"classes": ["a", "b\x00"]},
        {"shards": 0},
        {"slices": 65},
        {"name": "No"},
        {"subject_row_cap": 0},
        {"unknown": 1},
    ):
        assert api.client.post("/v1/datasets", json={**taken, "name": "other", **wrong}).status_code == 422


def test_models_must_fit_their_datasets(api: Api) -> None:
    api.dataset()
    api.dataset("evaluation", deletable=False)
    api.dataset("deletable")
    body = {"name": "m", "dataset": "reviews", "recipe": RECIPE, "evaluation_dataset": "evaluation"}
    for change, field in (
        ({"recipe": {**RECIPE, "shards": 3}}, "recipe.shards"),
        ({"recipe": {**RECIPE, "classes": ["good", "bad"]}}, "recipe.classes"),
        ({"recipe": {**RECIPE, "epochs": "3"}}, "recipe.epochs"),
        ({"recipe": {**RECIPE, "colour": 1}}, "recipe"),
        ({"recipe": {**RECIPE, "orders": 3}}, "recipe"),
        ({"dataset": "missing"}, "dataset"),
        ({"evaluation_dataset": "missing"}, "evaluation_dataset"),
        ({"evaluation_dataset": "deletable"}, "evaluation_dataset"),
        (
            {"recipe": {**RECIPE, "backbone": {**RECIPE["backbone"], "provenance": "own_contains_subjects"}}},
            "recipe.backbone.provenance",
        ),
    ):
        answer = api.client.post("/v1/models", json={**body, **change})
        assert (answer.status_code, answer.json()["field"]) == (422, field), answer.text
    made = api.client.post("/v1/models", json={**body, "erase_after_seconds": 60})
    assert made.status_code == 201
    assert made.json()["erase_after_seconds"] == 60
    assert (made.json()["version"], made.json()["depths"]) == (0, [0, 0])
    assert api.client.post("/v1/models", json=body).status_code == 409
    again = api.client.post("/v1/models", json={**body, "name": "other"})
    assert "equal weights" in again.json()["detail"]
    assert api.client.get("/v1/models/missing").status_code == 404
    assert [model["name"] for model in api.client.get("/v1/models").json()["models"]] == ["m"]


def test_the_grid_of_an_untrained_model(api: Api) -> None:
    api.dataset()
    api.model()
    api.upload(line(n) for n in range(20))
    grid = api.client.get("/v1/models/sentiment/shards").json()
    assert [shard["depth"] for shard in grid["shards"]] == [0, 0]
    slices = [each for shard in grid["shards"] for each in shard["slices"]]
    assert sum(each["rows"] for each in slices) == 20
    assert {each["state"] for each in slices} == {"inactive"}
    assert grid["orders"] == [[0, 1], [1, 0]]
    assert api.client.get("/v1/models/sentiment/versions").json()["versions"] == []


def test_health_and_figures(api: Api) -> None:
    assert httpx.get(f"{api.url}/healthz").text == "ok\n"
    assert httpx.get(f"{api.url}/readyz").json() == {"status": "ready"}
    api.dataset()
    api.model()
    api.request("canary@example.org")
    text = httpx.get(f"{api.url}/metrics").text
    assert 'expunge_requests{state="received"} 1.0' in text
    assert 'expunge_requests{state="failed"} 0.0' in text
    assert 'expunge_stage_jobs{state="queued"} 0.0' in text
    assert 'expunge_model_floor{model="sentiment"} 0.0' in text
    assert "expunge_oldest_open_request_timestamp_seconds 1." in text
    assert 'route="/v1/deletion-requests",status="202"' in text
    assert "canary" not in text


def test_without_postgres_calls_are_503_and_the_program_lives(tmp_path: Path, valkey: str) -> None:
    settings = Settings(
        database_url=f"postgresql:///x?host={tmp_path}&user=x",
        redis_url=valkey,
        artifact_url=(tmp_path / "artifacts").as_uri(),
        file_keys_url=file_keys(tmp_path / "artifacts"),
        keys_dir=write_keys(tmp_path / "keys"),
    )
    with serving(settings) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        for path in ("/readyz", "/v1/datasets", "/metrics"):
            headers = {"Authorization": "Bearer xp_aaaaaaaa_" + "a" * 43}
            answer = httpx.get(url + path, headers=headers, timeout=20)
            assert answer.status_code == 503, path
            assert answer.headers["Retry-After"] == "1"


def test_the_doorbell_rings_and_coalesces(api: Api, valkey: str) -> None:
    client = redis.Redis.from_url(valkey)
    client.delete("plan", "default")
    api.dataset()
    api.model()
    for _ in range(20):
        assert api.request().status_code == 202
    assert api.client.post("/v1/models/sentiment/rebuild").status_code == 202
    deadline = time.monotonic() + 5
    while not client.llen("default"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    message = json.loads(client.lindex("plan", 0))
    assert message["headers"]["task"] == "targets.plan"
    assert json.loads(client.lindex("default", 0))["headers"]["task"] == "model.rebuild"
    assert 1 <= client.llen("plan") <= 20
    assert api.scalar("SELECT rebuild_wanted FROM model") is True
    client.delete("plan", "default")
    client.close()


def test_an_answer_does_not_wait_for_redis(api_settings: Settings, tmp_path: Path) -> None:
    settings = api_settings.model_copy(update={"redis_url": f"unix://{tmp_path}/nothing.sock?db=0"})
    token = api_keys.bootstrap(settings.database_url)
    with serving(settings) as url:
        client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"})
        dataset = {"name": "d", "shards": 2, "slices": 2, "classes": ["bad", "good"]}
        assert client.post("/v1/datasets", json=dataset).status_code == 201
        model = {"name": "m", "dataset": "d", "recipe": RECIPE}
        assert client.post("/v1/models", json=model).status_code == 201
        body = {"subject": {"type": "email", "value": "a@example.org"}}
        client.post("/v1/deletion-requests", json=body)
        started = time.monotonic()
        for _ in range(10):
            assert client.post("/v1/deletion-requests", json=body).status_code == 202
        assert time.monotonic() - started < 5
        client.close()


def test_a_doorbell_keeps_what_it_could_not_send(tmp_path: Path) -> None:
    bell = Doorbell(f"unix://{tmp_path}/nothing.sock")
    bell.start()
    bell.ring(Task.PLAN, 7)
    time.sleep(0.5)
    bell.stop()
    assert bell._pending == {(Task.PLAN, 7)}


def test_broker_urls() -> None:
    assert broker_url("unix:///run/v.sock?db=3") == "redis+socket:///run/v.sock?virtual_host=3"
    assert broker_url("unix:///run/v.sock") == "redis+socket:///run/v.sock?virtual_host=0"
    assert broker_url("redis://h:1/2") == "redis://h:1/2"
    for wrong in ("", "http://h", "unix:"):
        with pytest.raises(ValueError, match="EXPUNGE_REDIS_URL"):
            broker_url(wrong)


def test_secrets_are_private_files(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys")
    secrets = read_secrets(keys)
    assert len(secrets.pepper) == len(secrets.partition) == 32
    assert secrets.pepper.hex() not in repr(secrets)
    (keys / "pepper").chmod(0o640)
    with pytest.raises(SecretsError, match="chmod 600"):
        read_secrets(keys)
    (keys / "pepper").chmod(0o600)
    (keys / "pepper").write_text("abc")
    with pytest.raises(SecretsError, match="32 bytes"):
        read_secrets(keys)
    (keys / "pepper").unlink()
    with pytest.raises(SecretsError, match="missing"):
        read_secrets(keys)


def test_identifiers_are_normalised_before_they_are_hashed() -> None:
    pepper = b"p" * 32
    same = subjects.alias_of(pepper, "email", "ann@example.org")
    assert subjects.alias_of(pepper, "email", " ANN@Example.ORG\n") == same
    assert subjects.alias_of(pepper, "user_id", "ann@example.org") != same
    assert subjects.alias_of(pepper, "user_id", "A") != subjects.alias_of(pepper, "user_id", "a")
    assert subjects.alias_of(b"q" * 32, "email", "ann@example.org") != same


def test_other_keys_than_the_datas_own_are_refused(api: Api) -> None:
    """With another pepper every look-up would miss, and each deletion end as no_match."""
    assert api.client.get("/readyz").status_code == 200
    right = read_secrets(api.settings.keys_dir)
    wrong = Secrets(pepper=bytes(32), partition=right.partition)
    with make_pool(api.settings.database_url, size=1) as pool:
        pool.wait()
        with transaction(pool) as connection:
            check_secrets(connection, right)
        with transaction(pool) as connection, pytest.raises(SecretsError, match="pepper"):
            check_secrets(connection, wrong)
