"""`expunge replay` from files, with the API and without; and what the API says of served stages and replays."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_client import serving, write_keys
from test_replays import age, drawn, plant, replayed
from typer.testing import CliRunner
from world_copies import Copy, Mould

from service.cli.main import app
from service.store import api_keys
from service.store.database import transaction

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration


@dataclass
class Site:
    world: Copy
    home: Path
    client: httpx.Client

    def run(self, *options: str) -> tuple[int, dict[str, Any], str]:
        """Exit code, JSON, stderr."""
        done = CliRunner().invoke(app, ["replay", *self.where, *options, "--json"])
        return done.exit_code, json.loads(done.stdout) if done.stdout else {}, done.stderr

    def say(self, *options: str) -> tuple[int, str]:
        """Exit code, and what people read."""
        done = CliRunner().invoke(app, ["replay", *self.where, *options])
        return done.exit_code, done.stdout

    @property
    def where(self) -> list[str]:
        root = self.world.context.artifacts.files.root
        return ["--artifacts", str(root), "--file-keys", str(root.with_name("file-keys"))]

    @property
    def files(self) -> list[str]:
        return ["--recipe", str(self.home / "recipe.json")]


@pytest.fixture
def site(trained: Mould, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with trained.copy(tmp_path) as world:
        keys, redis = write_keys(tmp_path / "keys"), f"unix://{tmp_path}/nobody?db=0"
        settings = world.context.settings.model_copy(update={"keys_dir": keys, "redis_url": redis})
        with transaction(world.pool) as connection:
            token = api_keys.create(connection, "reader", [])
        (tmp_path / "recipe.json").write_text(json.dumps(world.recipe.to_json()))
        headers = {"Authorization": f"Bearer {token}"}
        with serving(settings) as url, httpx.Client(base_url=url, headers=headers) as client:
            monkeypatch.setenv("EXPUNGE_API_URL", url)
            monkeypatch.setenv("EXPUNGE_API_KEY", token)
            yield Site(world, tmp_path, client)


def test_every_stage_is_replayed_from_files_alone(site: Site) -> None:
    code, shown, said = site.run(*site.files)
    assert (code, shown["equal"], shown["outcome"]) == (0, True, "equal"), said
    assert len(shown["stages"]) == len({each["stage"] for each in shown["stages"]}) == 8
    assert {each["outcome"] for each in shown["stages"]} == {"equal"}
    assert {each["made_on"] for each in shown["stages"]} == {None}
    key = shown["stages"][-1]["stage"]
    code, text = site.say(*site.files, "--stage", key[:10])
    assert code == 0
    assert text.startswith(f"equal    stage {key[:16]}  served ")


def test_a_sample_can_be_drawn_again(site: Site) -> None:
    _, first, _ = site.run(*site.files, "--sample", "2")
    assert len(first["stages"]) == 2
    _, again, _ = site.run(*site.files, "--sample", "2", "--seed", first["seed"])
    assert again == first
    code, text = site.say(*site.files, "--sample", "1", "--seed", "s7")
    assert code == 0
    assert text.endswith("drawn at random (--seed s7)\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--all", "--sample", "2"), "exclude each other"),
        (("--stage", "ffff"), "no stage ffff"),
        (("--artifacts", "/nowhere"), "holds no stages"),
        (("--recipe", "/nowhere"), "No such file"),
    ],
)
def test_what_cannot_be_done_is_said(site: Site, options: tuple[str, ...], said: str) -> None:
    code, shown, error = site.run(*site.files, *options)
    assert (code, shown) == (2, {})
    assert said in error


def test_served_stages_and_their_platforms_are_asked_of_the_api(site: Site) -> None:
    listed = site.client.get("/v1/models/tiny/stages").json()
    assert [(each["shard"], len(each["prefix"]), each["speaks"]) for each in listed["stages"]] == [
        (0, 1, False),
        (0, 2, True),
        (1, 1, False),
        (1, 2, True),
    ]
    code, shown, said = site.run("--model", "tiny", "--all")
    assert (code, shown["equal"]) == (0, True), said
    assert [each["stage"] for each in shown["stages"]] == [each["stage"] for each in listed["stages"]]
    assert all(each["made_on"] == each["fingerprint"] for each in shown["stages"])


def test_another_platform_is_told_from_a_difference(site: Site) -> None:
    listed = site.client.get("/v1/models/tiny/stages").json()
    listed["stages"][-1]["platform"] |= {"isa": "NEON", "cpu": "another"}
    kept = site.home / "stages.json"
    kept.write_text(json.dumps(listed))
    code, shown, _ = site.run(*site.files, "--platforms", str(kept))
    assert (code, shown["equal"], shown["outcome"]) == (3, False, "other_platform")
    assert [each["outcome"] for each in shown["stages"]] == ["equal", "equal", "equal", "other_platform"]
    assert (shown["stages"][-1]["differs"], shown["stages"][-1]["found"]) == (["cpu", "isa"], None)
    code, text = site.say(*site.files, "--platforms", str(kept), "--stage", listed["stages"][-1]["stage"])
    assert code == 3
    assert "made on another platform: differs in cpu, isa; digests are not comparable" in text
    # What stands on a stage of another platform cannot be compared here either.
    listed["stages"][-1]["platform"] = listed["stages"][0]["platform"]
    listed["stages"][-2]["platform"] = {**listed["stages"][0]["platform"], "isa": "NEON"}
    kept.write_text(json.dumps(listed))
    code, text = site.say(*site.files, "--platforms", str(kept), "--stage", listed["stages"][-1]["stage"])
    assert code == 3
    assert "differs in a stage that it stands on" in text


def test_a_difference_is_found_and_shown(site: Site) -> None:
    world = site.world
    age(world)
    (replay_id,) = drawn(world)
    (key, true) = world.row("SELECT stage_key, digest FROM replay")
    wrong, _ = plant(world, key)
    with transaction(world.pool) as connection:
        connection.execute("UPDATE replay SET digest = %s", [wrong])
    (waiting,) = site.client.get("/v1/models/tiny/replays").json()["replays"]
    assert (waiting["outcome"], waiting["replayed_on"], waiting["differs"]) == (None, None, [])
    code, shown, error = site.run("--model", "tiny", "--stage", key)
    assert (code, shown["outcome"]) == (1, "mismatch")
    assert (shown["stages"][0]["expected"], shown["stages"][0]["found"]) == (wrong, true)
    assert "keep the file" in error
    code, text = site.say(*site.files, "--stage", key)
    assert code == 1
    assert text.startswith("DIFFERS ")
    assert "its platform is not known here" in text

    replayed(world, replay_id)
    (ended,) = site.client.get("/v1/models/tiny/replays").json()["replays"]
    assert (ended["outcome"], ended["stage"], ended["digest"]) == ("mismatch", key, wrong)
    assert (ended["differs_at"], ended["found"], ended["differs"]) == (key, true, [])
    release = f"/v1/models/tiny/replays/{replay_id}/release"
    assert site.client.post(release).status_code == 403
    with transaction(world.pool) as connection:
        token = api_keys.create(connection, "admin", [api_keys.Scope.MODEL_ADMIN])
    admin = {"Authorization": f"Bearer {token}"}
    assert site.client.post(release, headers=admin).status_code == 202
    assert site.client.post(release, headers=admin).status_code == 404
    (released,) = site.client.get("/v1/models/tiny/replays").json()["replays"]
    assert released["released_at"] is not None
    assert key not in [each["stage"] for each in site.client.get("/v1/models/tiny/stages").json()["stages"]]
    text = httpx.get(f"{site.client.base_url}/metrics").text
    assert 'expunge_replays_total{outcome="mismatch"} 1.0' in text
    assert 'expunge_replays_total{outcome="equal"} 0.0' in text
    assert 'expunge_replayable_share{model="tiny"} 1.0' in text


def test_stages_whose_records_are_gone_are_passed_over(site: Site) -> None:
    world = site.world
    (name, shard, piece) = world.row("SELECT object_name, shard, slice FROM cell WHERE object_name IS NOT NULL LIMIT 1")
    world.context.artifacts.delete(name)
    code, shown, _ = site.run(*site.files)
    assert (code, shown["outcome"]) == (0, "equal")
    lost = {each["stage"] for each in shown["stages"] if each["outcome"] == "skipped"}
    query = "SELECT stage_key FROM stage WHERE shard = %s AND %s = ANY(prefix)"
    assert lost == {key for (key,) in world.rows(query, shard, piece)}
    code, _, error = site.run(*site.files, "--stage", lost.pop())
    assert code == 2
    assert "some were erased since" in error


def test_an_unknown_model_and_no_key(site: Site) -> None:
    assert site.client.get("/v1/models/nobody/replays").status_code == 404
    assert site.client.get("/v1/models/tiny/replays", params={"limit": 0}).status_code == 422
    for path in ("replays", "stages"):
        assert httpx.get(f"{site.client.base_url}/v1/models/tiny/{path}").status_code == 401
