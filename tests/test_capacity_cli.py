"""`expunge capacity`: the forecast of a real model through the API, and simulations without any server."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_client import Api, line
from world_copies import Copy

from service.cli.main import main
from service.cli.pictures import Point, draw_frontier
from service.store import capacity, models, publish
from service.store.database import transaction
from workers import steps

pytest_plugins = ("api_fixtures", "world_fixtures")

Run = Callable[..., tuple[int, str, str]]
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--users", "100000", "--rate", "5", "--shards", "4", "--slices", "3", "--days", "4", "--histories", "20")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", "capacity", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def state(api: Api, tmp_path: Path) -> str:
    found = tmp_path / "state"
    (found / "run").mkdir(parents=True)
    (found / "keys").mkdir()
    (found / "run" / "up.json").write_text(json.dumps({"api_url": api.url, "servers": []}))
    token = api.client.headers["Authorization"].removeprefix("Bearer ")
    (found / "keys" / "first-api-key").write_text(token + "\n")
    return str(found)


def forecast(world: Copy, **asked: Any) -> dict[str, Any]:
    with transaction(world.pool) as connection:
        model = models.get_model_by_id(connection, world.model_id)
        return capacity.forecast(connection, model, **asked).to_json()


def test_a_simulation_needs_no_server(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "months.png"
    code, out, err = run("--simulate", *SMALL, "--out", str(picture))
    assert (code, err) == (0, "")
    for name in ("SISA", "S3T, no rebuild", "S3T, by deadline", "S3T, monthly full retrain"):
        assert name in out
    assert str(picture) in out
    assert picture.read_bytes().startswith(PNG)


def test_a_simulation_as_json_says_what_was_simulated(run: Run) -> None:
    code, out, err = run("--simulate", *SMALL, "--rates", "1,1,8", "--orders", "2", "--json")
    body = json.loads(out)
    assert (code, err) == (0, "")
    assert (body["scenario"]["users"], body["scenario"]["rates"]) == (100_000, [1, 1, 8])
    assert all(len(curve["depth"]) == len(curve["work"]) == 4 for curve in body["curves"])
    assert json.loads(run("--simulate", *SMALL, "--rates", "1,1,8", "--orders", "2", "--json")[1]) == body


def test_a_frontier_is_drawn(tmp_path: Path) -> None:
    points = [Point("SISA", 1.0, 0.3, 0.0, "SISA"), Point("1", 0.4, 0.5, 0.3, "S3T"), Point("2", 0.5, 0.7, 0.6, "S3T")]
    draw_frontier(points, "Work and depth", 0.45, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)


def test_a_simulation_loads_no_torch_and_no_picture_library() -> None:
    code = (
        "import sys; from service.cli.main import main\n"
        "sys.argv = ['expunge', 'capacity', '--simulate', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *SMALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a model"),
        (("m", "--simulate"), "needs no model"),
        (("--simulate", "--shards", "0"), "shards"),
        (("--simulate", "--rates", "1,x"), "--rates"),
        (("--simulate", "--rates", "1,2", "--slices", "3"), "prior"),
        (("--simulate", "--slices", "3", "--orders", "7"), "orders"),
        (("--simulate", "--rate", "nan"), "per_day"),
        (("--simulate", *SMALL, "--out", "/nowhere/at/all.png"), "--out"),
    ],
)
def test_what_cannot_be_shown_is_refused_and_says_what_to_do(run: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert said in err


@pytest.mark.integration
def test_a_model_that_was_never_trained(run: Run, api: Api, state: str, tmp_path: Path) -> None:
    api.dataset()
    api.upload(line(number) for number in range(40))
    api.model()
    picture = tmp_path / "shards.png"
    code, out, _ = run("sentiment", "--state", state, "--out", str(picture))
    assert code == 0
    assert "0/2" in out
    assert "work to full health: 100.0%" in out
    assert picture.read_bytes().startswith(PNG)
    code, out, _ = run("sentiment", "--state", state, "--rate", "3", "--layers", "12", "--json")
    body = json.loads(out)
    assert (body["per_day"], body["per_day_measured"], body["first_dead"]) == (3, False, 0)
    assert body["work"] == body["full_retrain"] > 0
    assert body["work_per_deletion"]["sisa"] > body["work_per_deletion"]["one_order"]


@pytest.mark.integration
def test_the_api_refuses_what_means_nothing(api: Api, run: Run, state: str) -> None:
    api.dataset()
    api.model()
    for query in ("per_day=0", "per_day=nan", "layers=0", "layers=x"):
        assert api.client.get(f"/v1/models/sentiment/capacity?{query}").status_code == 422, query
    assert api.client.get("/v1/models/nothing/capacity").status_code == 404
    code, out, err = run("nothing", "--state", state)
    assert (code, out) == (1, "")
    assert "there is no model of that name" in err


@pytest.mark.integration
def test_the_forecast_follows_deletions_and_the_rebuild(world: Copy) -> None:
    whole = forecast(world)
    recipe = world.recipe
    assert [shard["depth"] for shard in whole["shards"]] == [recipe.slices] * recipe.shards
    assert (whole["work"], whole["planned"]["stages"], whole["per_day"]) == (0, 0, 0)
    assert whole["first_dead"] > 1
    assert whole["shards"][0]["days_until_loss"] is None
    assert whole["work_per_deletion"]["monthly_full_retrain"] is None
    request_id = world.ask("s1")
    steps.plan_targets(world.context, world.model_id)
    hit = forecast(world)
    assert hit["per_day"] == pytest.approx(1 / 30)
    assert hit["per_day_measured"]
    assert sum(shard["depth"] for shard in hit["shards"]) < recipe.slices * recipe.shards
    assert 0 < hit["work"] < hit["full_retrain"]
    assert hit["planned"]["stages"] > 0
    assert hit["all_dead"] < whole["all_dead"]
    depths = [shard["depth"] for shard in hit["shards"]]
    with transaction(world.pool) as connection:
        served = publish.candidate(connection, models.get_model_by_id(connection, world.model_id)).assembly
    assert list(served.depths) == depths
    world.finish(request_id)
    assert forecast(world, per_day=2.0)["shards"][0]["days_until_dead"] is not None
