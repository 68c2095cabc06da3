"""Deletion priors: fixed per subject and dataset at first sight, like prior shares slices, content decides nothing."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from api_client import RECIPE, Api, line
from conftest import Database
from hypothesis import given
from hypothesis import strategies as st
from test_workers_path import build
from tiny import tiny_backbone
from typer.testing import CliRunner, Result
from world import make_world
from world_copies import Copy

from service.cli.data_commands import app
from service.store import datasets, priors
from service.store.artifacts import Artifacts
from service.store.database import transaction
from service.store.ingest import ingest
from service.store.priors import Prior
from shards.orders import weighted
from shards.partition import Cell, cell_of, dataset_key
from shards.recipe import PriorClass
from workers import steps

pytest_plugins = ("api_fixtures",)
pytestmark = pytest.mark.integration

KEY = dataset_key(b"k" * 32, UUID(int=1))
PRIORS = [
    {"name": "steady", "slices": 3},
    {"name": "busy", "slices": 2},
    {"name": "leaving", "slices": 1, "expires": True},
]
SPANS = {"steady": {0, 1, 2}, "busy": {3, 4}, "leaving": {5}}


def test_cells_without_priors_are_those_they_always_were() -> None:
    places = [cell_of(KEY, UUID(int=number), shards=4, slices=3) for number in range(8)]
    assert [(place.shard, place.slice) for place in places] == [
        (2, 2),
        (3, 2),
        (1, 1),
        (1, 1),
        (2, 2),
        (0, 1),
        (2, 0),
        (2, 0),
    ]
    whole = [cell_of(KEY, UUID(int=number), shards=4, slices=3, span=range(3)) for number in range(8)]
    assert whole == places


@given(st.uuids(), st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_cell_lies_in_its_span(subject: UUID, shards: int, slices: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, slices - 1))
    span = range(start, data.draw(st.integers(start + 1, slices)))
    cell = cell_of(KEY, subject, shards=shards, slices=slices, span=span)
    assert 0 <= cell.shard < shards
    assert cell.slice in span


def test_subjects_of_a_class_spread_over_all_of_its_cells() -> None:
    cells = [cell_of(KEY, UUID(int=n), shards=4, slices=6, span=range(3, 5)) for n in range(4000)]
    counts = [cells.count(Cell(shard, piece)) for shard in range(4) for piece in (3, 4)]
    assert sum((count - 500) ** 2 / 500 for count in counts) < 24.3  # chi-square, 7 degrees, p = 0.001


@pytest.mark.parametrize("span", [range(2, 2), range(-1, 2), range(2, 4), range(0, 3, 2)])
def test_a_span_outside_of_the_grid_is_refused(span: range) -> None:
    with pytest.raises(ValueError, match=r"consecutive ones of 0\.\.2"):
        cell_of(KEY, UUID(int=1), shards=4, slices=3, span=span)


def declare(api: Api, name: str = "reviews") -> None:
    api.dataset(name, slices=6, priors=PRIORS)


def places(api: Api, dataset: str = "reviews") -> dict[UUID, set[tuple[int, int]]]:
    """Of each owner the cells of its records."""
    with api.database() as connection:
        rows = connection.execute(
            "SELECT owner_id, shard, slice FROM record r JOIN cell USING (cell_id)"
            " WHERE r.dataset_id = (SELECT dataset_id FROM dataset WHERE name = %s)",
            [dataset],
        ).fetchall()
    found: dict[UUID, set[tuple[int, int]]] = {}
    for owner, shard, piece in rows:
        found.setdefault(owner, set()).add((shard, piece))
    return found


def slices_of(api: Api, dataset: str = "reviews") -> set[int]:
    return {piece for cells in places(api, dataset).values() for _, piece in cells}


def test_subjects_of_like_prior_share_slices(api: Api) -> None:
    declare(api)
    shown = api.client.get("/v1/datasets/reviews").json()["priors"]
    assert shown == [{"expires": False, **prior} for prior in PRIORS]
    for number, (name, span) in enumerate(SPANS.items()):
        before = places(api).keys()
        lines = [line(n, prior=name) for n in range(100 * number, 100 * number + 40)]
        assert api.upload(lines).json()["accepted"] == 40
        assert {piece for owner in places(api).keys() - before for _, piece in places(api)[owner]} == span
    assert all(len(cells) == 1 for cells in places(api).values())


def test_without_a_class_it_is_the_first_and_a_date_is_the_one_that_expires(api: Api) -> None:
    declare(api)
    assert api.upload(line(n) for n in range(40)).status_code == 201
    assert slices_of(api) == SPANS["steady"]
    lines = [line(n, expires_at="2030-12-31") for n in range(100, 140)]
    assert api.upload(lines).status_code == 201
    assert slices_of(api) == SPANS["steady"] | SPANS["leaving"]
    with api.database() as connection:
        rows = connection.execute("SELECT t::text FROM subject_prior t").fetchall()
    assert len(rows) == 80
    assert not [row for row in rows if "2030" in row[0]]


def test_the_first_sight_stands(api: Api) -> None:
    """Whatever later lines say, of the same upload or of another, a subject's records stay together."""
    declare(api)
    first = [line(0, "ann", prior="busy"), line(1, "ann", prior="steady"), line(2, "ann")]
    assert api.upload(first).json()["accepted"] == 3
    home = places(api)
    assert all(piece in SPANS["busy"] for cells in home.values() for _, piece in cells)
    for number, said in enumerate(({"prior": "steady"}, {"expires_at": "2030-01-01"}, {}), 10):
        assert api.upload([line(number, "ann", **said)]).json()["accepted"] == 1
    assert places(api) == home
    assert all(len(cells) == 1 for cells in home.values())


def test_a_subject_has_a_class_in_each_dataset_and_only_where_it_owns_records(api: Api) -> None:
    declare(api)
    declare(api, "letters")
    api.dataset("plain", slices=6)
    bob = [{"type": "email", "value": "bob"}]
    assert api.upload([line(0, "ann", prior="busy", also_concerns=bob)]).status_code == 201
    assert api.scalar("SELECT count(*) FROM subject_prior") == 1
    assert api.upload([line(0, "ann", prior="leaving"), line(1, "bob", prior="leaving")], "letters").status_code == 201
    assert api.upload([line(0, "ann")], "plain").status_code == 201
    assert slices_of(api, "letters") == SPANS["leaving"]
    assert slices_of(api) <= SPANS["busy"]
    assert api.scalar("SELECT count(*) FROM subject_prior") == 3


def test_subjects_who_come_or_go_move_nobody(api: Api) -> None:
    declare(api)
    api.upload(line(n, prior="busy") for n in range(20))
    home = places(api)
    api.upload(line(n, prior=("steady", "busy", "leaving")[n % 3]) for n in range(100, 160))
    with api.database() as connection:
        gone = connection.execute(
            "DELETE FROM record_subject WHERE record_id IN (SELECT record_id FROM record LIMIT 40) RETURNING record_id"
        ).fetchall()
        connection.execute("DELETE FROM record WHERE record_id = ANY(%s)", [[record for (record,) in gone]])
    api.upload(line(n + 1000, f"p{n}@example.org") for n in range(20))
    now = places(api)
    assert all(now[owner] == cells for owner, cells in home.items())


def test_uploads_side_by_side_agree_on_the_first_sight(api: Api) -> None:
    declare(api)

    def send(part: int) -> int:
        said = ("steady", "busy", "leaving")[part % 3]
        answer = api.upload(line(100 * part + n, f"p{n}@example.org", prior=said) for n in range(10))
        assert answer.status_code in {201, 503}, answer.text
        return answer.json().get("accepted", 0)

    with ThreadPoolExecutor(4) as executor:
        assert sum(executor.map(send, range(6))) >= 10
    found = places(api)
    assert len(found) == api.scalar("SELECT count(*) FROM subject_prior") == 10
    assert all(len(cells) == 1 for cells in found.values())


def test_a_line_that_is_skipped_fixes_nothing(api: Api) -> None:
    declare(api)
    api.dataset("other")
    api.model(dataset="other")
    api.upload([line(0, "gone")], "other")
    api.request("gone")
    with api.database() as connection:
        connection.execute(
            "INSERT INTO do_not_train (subject_id, dataset_id, request_id)"
            " SELECT subject_id, NULL, request_id FROM deletion_request"
        )
    assert api.upload([line(1, "gone", prior="busy"), line(2)]).json()["skipped"] == 1
    assert api.scalar("SELECT count(*) FROM subject_prior") == 1


@pytest.mark.parametrize(
    ("bad", "field", "says"),
    [
        ({"prior": "vip"}, "prior", "none of the dataset's priors"),
        ({"prior": 1}, "prior", "must be a string"),
        ({"prior": None}, "prior", "must be a string"),
        ({"prior": ""}, "prior", "is empty"),
        ({"expires_at": "tomorrow"}, "expires_at", "a date such as 2030-12-31"),
        ({"expires_at": "2030-02-30"}, "expires_at", "a date such as 2030-12-31"),
        ({"expires_at": 2030}, "expires_at", "must be a string"),
        ({"prior": "busy", "expires_at": "2030-01-01"}, "expires_at", "leave one out"),
    ],
)
def test_a_wrong_prior_is_named_and_nothing_is_kept(api: Api, bad: dict[str, Any], field: str, says: str) -> None:
    declare(api)
    problem = api.upload([line(0, prior="busy"), line(1, **bad)]).json()
    assert (problem["status"], problem["line"], problem["field"]) == (422, 2, field)
    assert says in problem["detail"]
    assert "vip" not in problem["detail"]
    assert api.scalar("SELECT count(*) FROM subject_prior") == 0


def test_a_dataset_without_priors_takes_none(api: Api) -> None:
    api.dataset()
    assert "none of the dataset's priors" in api.upload([line(0, prior="busy")]).json()["detail"]
    assert "leave expires_at out" in api.upload([line(0, expires_at="2030-01-01")]).json()["detail"]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ([{"name": "a", "slices": 2}], "add up to 6"),
        ([{"name": "a", "slices": 3}, {"name": "a", "slices": 3}], "distinct names"),
        ([{"name": "a", "slices": 6}, {"name": "b", "slices": 0}], "greater than or equal to 1"),
        ([{"name": n, "slices": 3, "expires": True} for n in "ab"], "only one of priors"),
        ([{"name": "Ann Smith", "slices": 6}], "pattern"),
        ([{"name": "a", "slices": 6, "rate": 1.0}], "Extra inputs"),
    ],
)
def test_a_wrong_declaration_is_refused(api: Api, bad: list[dict[str, Any]], says: str) -> None:
    body = {"name": "reviews", "shards": 2, "slices": 6, "classes": ["bad", "good"], "priors": bad}
    answer = api.client.post("/v1/datasets", json=body)
    assert answer.status_code == 422
    assert says in answer.text


RATED = [{**prior, "rate": rate} for prior, rate in zip(PRIORS, (1.0, 8.0, 2.0), strict=True)]


def test_a_recipe_gives_each_of_the_datasets_priors_a_rate(api: Api) -> None:
    declare(api)
    api.dataset("plain", slices=6)
    recipe = {**RECIPE, "slices": 6, "orders": 4}

    def create(dataset: str, prior: list[dict[str, Any]]) -> Any:
        body = {"name": "sentiment", "dataset": dataset, "recipe": {**recipe, "prior": prior}}
        return api.client.post("/v1/models", json=body)

    for dataset, prior in (
        ("reviews", []),
        ("reviews", RATED[::-1]),
        ("reviews", [{**RATED[0], "name": "other"}, *RATED[1:]]),
        ("reviews", [*RATED[:2], {**RATED[2], "expires": False}]),
        ("reviews", [{**RATED[0], "slices": 2}, {**RATED[1], "slices": 3}, RATED[2]]),
        ("plain", RATED),
    ):
        answer = create(dataset, prior)
        assert (answer.status_code, answer.json()["field"]) == (422, "recipe.prior"), answer.text
    answer = create("reviews", [{**RATED[0], "rate": "often"}, *RATED[1:]])
    assert answer.status_code == 422
    answer = create("reviews", [{**RATED[0], "rate": -1.0}, *RATED[1:]])
    assert "rate of slice 0 must be a finite number" in answer.json()["detail"]
    assert create("reviews", RATED).status_code == 201
    orders = api.client.get("/v1/models/sentiment/shards").json()["orders"]
    assert orders == [list(order) for order in weighted([1, 1, 1, 8, 8, 2], 4, {5})]
    assert all(order[-1] == 5 for order in orders)


@pytest.fixture
def world(database: Database, tmp_path: Path) -> Iterator[Copy]:
    """A model on a dataset with priors; nothing ingested."""
    classes = tuple(PriorClass(name=name, rate=rate, slices=1) for name, rate in (("steady", 1.0), ("busy", 9.0)))
    made = make_world(database, tmp_path, tiny_backbone(tmp_path / "backbone", layers=2, width=16), prior=classes)
    with transaction(made.pool) as connection:
        priors.insert_priors(connection, made.dataset.dataset_id, [Prior("steady", 1), Prior("busy", 1)])
        made.dataset = datasets.get_dataset(connection, made.dataset.name)
    yield Copy(**{name: getattr(made, name) for name in type(made).__dataclass_fields__}, owner_url=database.owner_url)
    made.pool.close()


def add(world: Copy, rows: dict[str, list[str]], prior: int) -> None:
    named = [(subject, name) for subject, names in rows.items() for name in names]
    lines = [replace(world.line(number, *each), prior=prior) for number, each in enumerate(named, 1)]
    ingest(world.pool, world.context.artifacts, world.secrets.partition, world.dataset, lines)


def home(world: Copy, subject: str) -> list[tuple[int, int]]:
    return world.rows(
        "SELECT DISTINCT shard, slice FROM record r JOIN cell USING (cell_id)"  # type: ignore[return-value]
        " JOIN subject_alias a ON a.subject_id = r.owner_id WHERE a.digest = %s",
        world.line(0, subject, "x").owner.digest,
    )


def test_a_deletion_finds_the_records_and_forgets_the_class_with_the_last_of_them(world: Copy) -> None:
    add(world, {f"calm{n}": [f"c{n}"] for n in range(12)}, 0)
    add(world, {f"busy{n}": [f"b{n}", f"b{n}again"] for n in range(6)}, 1)
    build(world)
    assert world.recipe.slice_orders == ((0, 1), (1, 0))
    others = {subject: home(world, subject) for subject in ("calm1", "busy1")}
    assert others["calm1"][0][1] == 0
    assert others["busy1"][0][1] == 1
    request = world.ask("busy0")
    steps.plan_targets(world.context, world.model_id)
    world.finish(request)
    assert world.states(request) == [("completed", "erased")]
    world.no_trace_of(request)
    assert world.row("SELECT count(*) FROM subject_prior") == (17,)
    # With the person's consent the next record is a first sight again; nobody else has moved.
    world.as_owner("UPDATE do_not_train SET lifted_at = now()")
    add(world, {"busy0": ["new"]}, 0)
    add(world, {"calm1": ["c1more"], "busy1": ["b1more"]}, 0)
    assert home(world, "busy0")[0][1] == 0
    assert {subject: home(world, subject) for subject in others} == others


def test_a_class_that_is_forgotten_under_an_upload_is_fixed_again(world: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the subject would own records without a class, and the next line could move it."""
    add(world, {"ann": ["a"]}, 1)
    get = Artifacts.get
    late = iter(("DELETE FROM record_subject", "DELETE FROM subject_prior", "DELETE FROM record"))

    def erased_meanwhile(artifacts: Artifacts, name: str) -> bytes:
        with transaction(world.pool) as connection:
            for statement in late:
                connection.execute(statement)  # type: ignore[arg-type]
        return get(artifacts, name)

    monkeypatch.setattr(Artifacts, "get", erased_meanwhile)
    add(world, {"ann": ["again"]}, 0)
    assert list(late) == []
    assert world.rows("SELECT prior FROM subject_prior") == [(0,)]
    assert [piece for _, piece in home(world, "ann")] == [0]


def test_the_schema_keeps_a_class_from_moving_and_two_from_expiring(world: Copy) -> None:
    add(world, {"ann": ["a"]}, 1)
    for statement in (
        "INSERT INTO subject_prior SELECT dataset_id, subject_id, 0 FROM subject_prior",
        "UPDATE subject_prior SET prior = 0",
        "UPDATE prior_class SET slices = 2",
        "DELETE FROM prior_class",
        "INSERT INTO subject_prior SELECT dataset_id, subject_id, 9 FROM subject_prior, subject",
        "INSERT INTO prior_class SELECT dataset_id, 2 + n, 'x' || n, 1, true FROM dataset, generate_series(1, 2) n",
    ):
        with world.pool.connection() as connection, pytest.raises(psycopg.Error):
            connection.execute(statement)


def test_the_command_line_declares_them(api: Api, tmp_path: Path) -> None:
    state = tmp_path / "state"
    (state / "run").mkdir(parents=True)
    (state / "keys").mkdir()
    (state / "run" / "up.json").write_text(json.dumps({"api_url": api.url, "servers": []}))
    (state / "keys" / "first-api-key").write_text(api.client.headers["Authorization"].removeprefix("Bearer "))
    common = ["create", "reviews", "--class", "bad", "--class", "good", "--slices", "4", "--state", str(state)]

    def run(*options: str) -> Result:
        return CliRunner().invoke(app, [*common, *(word for option in options for word in ("--prior", option))])

    for option in ("steady", "steady:", ":3", "steady:x", "steady:3:x", "steady:3:expires:", "a:-1", ""):
        assert "--prior must be name:slices" in str(run(option).exception)
    assert "add up to 4" in str(run("steady:3").exception)
    assert run("steady:3", "leaving:1:expires").exit_code == 0
    assert api.client.get("/v1/datasets/reviews").json()["priors"] == [
        {"name": "steady", "slices": 3, "expires": False},
        {"name": "leaving", "slices": 1, "expires": True},
    ]
