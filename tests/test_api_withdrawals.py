"""Restrict, lift, revoke and holds over HTTP and from the command line: who may, what is answered, what is refused."""

import json
from typing import Any
from uuid import uuid4

import httpx
import pytest
from api_client import Api, Run, line
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from world import Bells

from service.store.api_keys import Scope
from service.store.artifacts import open_artifacts
from service.store.database import transaction
from workers import steps
from workers.barrier import Barrier
from workers.context import Context
from workers.sequencer import Sequencer

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration

WHY = {"reason_code": "contested"}
REQUESTS = "/v1/deletion-requests"


@pytest.fixture
def ready(api: Api) -> Api:
    """An API with two records of Ann, one of which concerns Bob, and a model."""
    api.dataset()
    api.model()
    bob = [{"type": "email", "value": "bob@example.org"}]
    lines = [line(0, "ann@example.org"), line(1, "ann@example.org", also_concerns=bob), line(2)]
    assert api.upload(lines).status_code == 201
    return api


@pytest.fixture
def work(ready: Api) -> Context:
    """What workers need to move the requests on; nothing is trained here."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = ready.settings.keys_dir / "signing.pem"
    path.touch(mode=0o600)
    path.write_bytes(pem)
    return Context(
        ready.settings, ready.pool, open_artifacts(ready.settings.artifact_url, ready.settings.file_keys_url), Bells()
    )  # type: ignore[arg-type]


def finish(work: Context, request: dict[str, Any], *, only_deactivate: bool = False) -> None:
    with transaction(work.pool) as connection:
        (model_id,) = connection.execute("SELECT model_id FROM model").fetchone() or (0,)
    steps.plan_targets(work, model_id)
    Barrier(work.pool, margin=0.05).look()
    if not only_deactivate:
        steps.erase_target(work, request["request_id"], model_id)
        sequencer = Sequencer(work.pool, work.artifacts, work.settings)
        sequencer.sequence()
        sequencer.publish()
        steps.certify_target(work, request["request_id"], model_id)


def ask(api: Api, who: str = "ann@example.org", **fields: Any) -> dict[str, Any]:
    answer = api.request(who, **fields)
    assert answer.status_code == 202, answer.text
    return answer.json()


def post(client: httpx.Client, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("kind", ["restrict", "object"])
def test_a_restriction_is_completed_and_lifted(ready: Api, work: Context, kind: str) -> None:
    request = ask(ready, kind=kind)
    assert (request["kind"], request["state"]) == (kind, "received")
    finish(work, request)
    path = request["links"]["self"]
    shown = ready.client.get(path).json()
    assert (shown["state"], shown["outcome"]) == ("completed", "restricted")
    assert ready.client.get(f"{path}/certificate").status_code == 200
    assert ready.upload([line(7, "ann@example.org")]).json()["skipped"] == 1
    status, body = post(ready.client, f"{path}/lift", WHY)
    assert (status, body["state"], body["outcome"]) == (202, "lifted", None)
    told = ready.client.get(f"{path}/events").json()["events"][-1]
    assert (told["kind"], told["body"]["reason_code"], told["body"]["records"]) == ("target.lifted", "contested", 2)
    status, body = post(ready.client, f"{path}/lift", WHY)
    assert (status, "lifted already" in body["detail"]) == (409, True)
    assert ready.upload([line(8, "ann@example.org")]).json()["accepted"] == 1


def test_an_objection_that_is_upheld_becomes_an_erasure(ready: Api, work: Context) -> None:
    objection = ask(ready, kind="object")
    finish(work, objection)
    erasure = ask(ready)
    finish(work, erasure)
    assert ready.client.get(erasure["links"]["self"]).json()["outcome"] == "erased"
    assert ready.scalar("SELECT count(*) FROM record") == 1
    status, body = post(ready.client, f"{objection['links']['self']}/lift", WHY)
    assert (status, body["state"]) == (202, "lifted")
    assert ready.scalar("SELECT count(*) FROM record") == 1


def test_an_erasure_is_revoked_until_it_begins(ready: Api, work: Context) -> None:
    early = ask(ready)
    assert post(ready.client, f"{early['links']['self']}/revoke", WHY)[1]["state"] == "revoked"
    late = ask(ready)
    path = late["links"]["self"]
    finish(work, late, only_deactivate=True)
    writer = ready.with_scopes(Scope.DELETION_WRITE)
    status, body = post(writer, f"{path}/lift", WHY)
    assert (status, "deletion:approve" in body["detail"]) == (403, True)
    status, body = post(ready.client, f"{path}/lift", WHY)
    assert (status, "asks for erasure" in body["detail"]) == (409, True)
    status, body = post(writer, f"{path}/revoke", WHY)
    assert (status, body["state"]) == (202, "revoked")
    assert body["targets"][0]["version"] is None  # the writer is told no more than the state
    last = ask(ready)
    finish(work, last)
    status, body = post(writer, f"{last['links']['self']}/revoke", WHY)
    assert (status, "no way back from it" in body["detail"]) == (409, True)


@pytest.mark.parametrize("verb", ["lift", "revoke"])
def test_withdrawals_need_a_reason_and_a_request(ready: Api, verb: str) -> None:
    request = ask(ready, kind="restrict")
    path = f"{request['links']['self']}/{verb}"
    for body in (None, {}, {"reason_code": "Ann Lee"}, {"reason_code": "x" * 65}, {**WHY, "why": "secret"}):
        answer = ready.client.post(path, json=body)
        assert answer.status_code == 422
        assert "Ann" not in answer.text
        assert "secret" not in answer.text
    assert post(ready.client, f"{REQUESTS}/{uuid4()}/{verb}", WHY)[0] == 404
    assert post(ready.client, f"{REQUESTS}/nonsense/{verb}", WHY)[0] == 404
    assert post(ready.with_scopes(Scope.DELETION_READ), path, WHY)[0] == 403
    assert ready.client.get(request["links"]["self"]).json()["state"] == "received"


def test_holds_are_placed_listed_and_released(ready: Api, work: Context) -> None:
    held = {"subject": {"type": "email", "value": " BOB@example.org"}, "reason_code": "litigation"}
    status, hold = post(ready.client, "/v1/holds", held)
    assert status == 201
    assert (hold["records"], hold["waiting"], hold["released_at"]) == (1, 0, None)
    assert post(ready.client, "/v1/holds", held)[1]["hold_id"] == hold["hold_id"]
    request = ask(ready)
    finish(work, request)
    shown = ready.client.get(request["links"]["self"]).json()
    assert (shown["state"], shown["targets"][0]["held"]) == ("deactivated", True)
    told = ready.with_scopes(Scope.DELETION_READ).get(request["links"]["self"]).json()
    assert told["targets"][0]["held"] is None
    path = hold["links"]["self"]
    assert ready.client.get(path).json()["waiting"] == 1
    status, released = post(ready.client, f"{path}/release")
    assert (status, released["waiting"]) == (200, 0)
    assert released["released_at"]
    status, body = post(ready.client, f"{path}/release")
    assert (status, "released before" in body["detail"]) == (409, True)
    finish(work, request)
    shown = ready.client.get(request["links"]["self"]).json()
    assert (shown["outcome"], shown["targets"][0]["held"]) == ("erased", False)
    for number in range(5):
        post(ready.client, "/v1/holds", {**held, "reason_code": f"case_{number}"})
    found: list[str] = []
    query: dict[str, Any] = {"open": True, "limit": 2}
    while True:
        page = ready.client.get("/v1/holds", params=query).json()
        found += [each["reason_code"] for each in page["holds"]]
        if page["next"] is None:
            break
        query["cursor"] = page["next"]
    assert found == [f"case_{number}" for number in (4, 3, 2, 1, 0)]
    assert len(ready.client.get("/v1/holds").json()["holds"]) == 6
    assert "bob" not in ready.client.get("/v1/holds").text
    kinds = "SELECT array_agg(kind ORDER BY id) FROM event_pending WHERE kind LIKE 'hold.%'"
    assert ready.scalar(kinds) == ["hold.placed", "hold.released", *["hold.placed"] * 5]


def test_holds_are_for_approvers_and_refuse_what_is_wrong(ready: Api) -> None:
    held = {"subject": {"type": "email", "value": "bob@example.org"}, "reason_code": "litigation"}
    writer = ready.with_scopes(Scope.DELETION_WRITE, Scope.DELETION_READ)
    assert post(writer, "/v1/holds", held)[0] == 403
    assert writer.get("/v1/holds").status_code == 403
    assert writer.get(f"/v1/holds/{uuid4()}").status_code == 403
    assert post(writer, f"/v1/holds/{uuid4()}/release")[0] == 403
    status, body = post(ready.client, "/v1/holds", {**held, "subject": {"type": "email", "value": "secret@x"}})
    assert (status, "nothing to hold" in body["detail"], "secret" in body["detail"]) == (409, True, False)
    for wrong in ({}, {"subject": held["subject"]}, {**held, "reason_code": "Bob Lee"}, {**held, "until": "never"}):
        assert post(ready.client, "/v1/holds", wrong)[0] == 422
    for query in ("limit=0", "limit=201", "open=maybe", "cursor=x"):
        assert ready.client.get(f"/v1/holds?{query}").status_code == 422
    assert ready.client.get(f"/v1/holds/{uuid4()}").status_code == 404
    assert ready.client.get("/v1/holds/nonsense").status_code == 404
    assert post(ready.client, f"/v1/holds/{uuid4()}/release")[0] == 404
    assert ready.scalar("SELECT count(*) FROM hold") == 0


def test_the_command_line_does_the_same(work: Context, run: Run) -> None:
    ann = ("--subject", "email:ann@example.org")
    code, out, _ = run("delete", *ann, "--kind", "restrict", "--json")
    request: dict[str, Any] = json.loads(out)
    assert (code, request["kind"]) == (0, "restrict")
    finish(work, request)
    assert "completed (restricted)" in run("requests", request["request_id"])[1]
    code, out, _ = run("lift", request["request_id"], "--reason", "resolved")
    assert (code, ": lifted" in out) == (0, True)
    code, _, err = run("revoke", request["request_id"], "--reason", "resolved")
    assert (code, "lifted already" in err) == (1, True)
    code, out, _ = run("hold", *ann, "--reason", "litigation", "--json")
    hold: dict[str, Any] = json.loads(out)
    assert (code, hold["records"]) == (0, 2)
    assert hold["hold_id"] in run("holds")[1]
    second: dict[str, Any] = json.loads(run("delete", *ann, "--json")[1])
    finish(work, second)
    code, out, _ = run("revoke", second["request_id"], "--reason", "withdrawn", "--json")
    assert (code, json.loads(out)["state"]) == (0, "revoked")
    assert run("release", hold["hold_id"])[0] == 0
    assert hold["hold_id"] not in run("holds")[1]
    assert hold["hold_id"] in run("holds", "--all")[1]
    for arguments, says in (
        (("lift", "../x", "--reason", "x"), "an id looks like"),
        (("release", str(uuid4())), "no hold with that id"),
        (("hold", "--subject", "ann", "--reason", "x"), "type:value"),
        (("hold", "--subject", "email:nobody@x", "--reason", "x"), "nothing to hold"),
        (("delete", *ann, "--kind", "forget"), "kind"),
    ):
        code, _, err = run(*arguments)
        assert (code, says in err) == (1, True), (arguments, err)
