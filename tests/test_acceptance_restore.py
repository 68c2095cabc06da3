"""An older backup of Postgres under the running programs: nothing is taken in or served before `expunge restore`."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from installation import DONE, Installation, installation
from tiny import tiny_backbone

from service.cli.demo.stack import EXPUNGE
from shards.recipe import Backbone

pytestmark = [pytest.mark.acceptance, pytest.mark.integration, pytest.mark.timeout(600)]


def restore(state: Path, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [*EXPUNGE, "restore", "--state", str(state), "--json", *options]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


def await_published(found: Installation) -> None:
    """The ledger's files hold every event."""

    def whole() -> bool:
        head = found.http.get("/v1/audit/log/checkpoint")
        newest = found.get("/v1/audit/events?start=0&limit=1000")["events"][-1]["index"]
        return head.is_success and int(head.text.split("\n")[1]) > newest

    found.until(whole, within=30)


def test_a_backup_from_before_a_deletion_is_shut_until_it_is_restored(tmp_path: Path) -> None:
    backbone = tiny_backbone(tmp_path / "backbone", layers=2, width=16)
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    state = home / "state"
    with installation(home, backbone) as found:
        found.make("m", subjects=12)
        found.train("m")
        await_published(found)
    shutil.copytree(state / "postgres", home / "backup", symlinks=True)
    with installation(home, backbone) as found:
        request_id = found.ask("m1")
        found.await_state(request_id, {"completed"})
        version = found.get("/v1/models/m")["version"]
        found.await_built("m", more_than=version - 1)
        await_published(found)
        version = found.get("/v1/models/m")["version"]
    shutil.rmtree(state / "postgres")
    shutil.copytree(home / "backup", state / "postgres", symlinks=True)
    with installation(home, backbone) as found:
        assert "QUARANTINE: the database holds" in found.stack.log.read_text()
        body = {"subject": {"type": "user", "value": "m2"}}
        answer = found.http.post("/v1/deletion-requests", json=body)
        assert (answer.status_code, "expunge restore" in answer.json()["detail"]) == (503, True)
        assert {found.predict(each, "m", "w1").status_code for each in range(2)} == {503}
        done = restore(state)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["replayed"] > 0
        assert found.request(request_id)["state"] == "completed"
        found.await_serving("m", version + 1)
        again = found.http.post("/v1/datasets/m-data/records", content=json.dumps(record("m1")))
        assert (again.status_code, again.json()["skipped"]) == (201, 1), again.text
        found.await_state(found.ask("m2"), DONE)
        found.until(lambda: verified(found), within=30)
        found.await_built("m", more_than=found.get("/v1/models/m")["floor"])
        before = newest(found)
        await_published(found)
    require_rebuilt(home, backbone, before)


def require_rebuilt(home: Path, backbone: Backbone, before: dict[str, Any]) -> None:
    """Postgres is lost as a whole, and comes back from artefacts and keys alone, with whom the data are about."""
    shutil.rmtree(home / "state" / "postgres")
    done = restore(home / "state")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["recovered"] > 0
    assert (report["records"], report["lost"], report["losses"]) == (0, 0, [])
    with installation(home, backbone) as found:  # with a new first key
        found.await_serving("m", before["version"] + 1)
        assert (newest(found)["assembly"], newest(found)["cause"]) == (before["assembly"], "restore")
        request_id = found.ask("m3")
        found.await_state(request_id, {"completed"})
        assert found.certificate(request_id, "m", home)[0] == 0


def newest(found: Installation) -> dict[str, Any]:
    """The model's newest version."""
    return max(found.get("/v1/models/m/versions")["versions"], key=lambda each: each["version"])


def record(subject: str) -> dict[str, Any]:
    about = {"type": "user", "value": subject}
    return {"record_id": f"again-{subject}", "subject": about, "text": "w1 w2", "label": "no"}


def verified(found: Installation) -> bool:
    """The whole ledger holds, across the restore."""
    log = str(found.stack.state / "artifacts" / "ledger")
    argv = [*EXPUNGE, "ledger", "verify", log, "--key", str(found.stack.public_key)]
    return subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 0


def test_where_nothing_is_wrong_a_restore_says_so_and_opens(tmp_path: Path) -> None:
    """On a state directory whose programs do not run: Postgres is started for it alone."""
    done = restore(tmp_path / "state")
    assert done.returncode == 1
    assert "signing.pem" in done.stderr
