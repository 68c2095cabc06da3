"""Gate, canary and rollback over HTTP and by command."""

import pytest
from api_client import Api, Run

from service.store.api_keys import Scope

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration


def test_what_is_not_there_is_refused_over_http_and_by_command(api: Api, run: Run) -> None:
    api.dataset()
    api.model()
    path = "/v1/models/sentiment"
    reason = {"reason_code": "regression"}
    assert api.client.post(f"{path}/versions/3:serve", json=reason).status_code == 404
    assert api.client.post(f"{path}/versions:unpin", json=reason).status_code == 409
    assert api.client.post(f"{path}/canary:promote", json=reason).status_code == 409
    assert api.client.post(f"{path}/canary:abort", json=reason).status_code == 409
    assert api.client.post(f"{path}/gate:override", json=reason).status_code == 409
    assert api.client.post(f"{path}/canary:abort", json={"reason_code": "an@address"}).status_code == 422
    assert api.client.post(f"{path}/versions/3:serve", json={}).status_code == 422
    weak = api.with_scopes(Scope.MODEL_PREDICT)
    assert weak.post(f"{path}/versions/3:serve", json=reason).status_code == 403
    assert api.client.patch(path, json={"gate": {"within": 1}}).status_code == 409  # no evaluation dataset
    assert api.client.patch(path, json={"gate": {}}).status_code == 422
    assert api.client.patch(path, json={}).status_code == 422
    changed = api.client.patch(path, json={"canary": {"share": 10, "minutes": 30}}).json()
    assert changed["canary"] == {"share": 10, "minutes": 30}
    assert api.client.patch(path, json={"min_shards": 2}).json()["canary"] == {"share": 10, "minutes": 30}
    code, out, _ = run("model", "canary", "sentiment")
    assert code == 0
    assert "10 %" in out
    code, out, _ = run("model", "canary", "sentiment", "--off")
    assert code == 0
    assert api.client.get(path).json()["canary"] is None
    code, _, err = run("model", "gate", "sentiment", "--within", "2")
    assert code == 1
    assert "evaluation" in err
    code, out, _ = run("model", "gate", "sentiment")
    assert (code, "no gate" in out) == (0, True)
    code, _, err = run("model", "serve", "sentiment", "1", "--reason", "regression")
    assert (code, "no version" in err) == (1, True)
    assert run("model", "unpin", "sentiment", "--reason", "fixed")[0] == 1
    code, _, err = run("model", "canary", "sentiment", "--promote")
    assert (code, "--reason" in err) == (1, True)
    code, out, _ = run("model", "versions", "sentiment")
    assert code == 0
