"""A trained world with an evaluation set, for tests of gate, canary and rollback."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from tiny import tiny_record
from world import World
from world_copies import Copy

from service.domain.release import Canary, Gate
from service.domain.requests import Kind
from service.store import datasets, ingest, models, policies, requests, stages, subjects
from service.store.database import Connection, transaction
from service.store.models import Model
from shards import plan
from shards.assembly import Assembly
from shards.manifest import Record
from shards.partition import dataset_key, record_id_of
from workers import steps
from workers.barrier import Barrier
from workers.gate import evaluate_model
from workers.training import train_queued

REFUSING, PASSING = Gate(at_least=0.6), Gate(at_least=0.5)
"""On an evaluation set of contradictions, of which every model answers half correctly."""


def evaluated(world: World, *, contradictions: bool = True) -> None:
    """Give the model an evaluation set: each text under both labels, or texts with a label of their own."""
    recipe, people = world.recipe, world.dataset
    with transaction(world.pool) as connection:
        held_out = datasets.insert_dataset(
            connection,
            name="held-out",
            shards=1,
            slices=1,
            classes=list(recipe.classes),
            deletable=False,
            subject_row_cap=1000,
        )
    key = dataset_key(world.secrets.partition, held_out.dataset_id)
    lines = []
    for number in range(40):
        made = tiny_record(f"e{number // 2 if contradictions else number}")
        label = recipe.classes[number % 2] if contradictions else made.label
        owner = subjects.alias_of(world.secrets.pepper, "user", f"e{number}")
        record = Record(record_id_of(key, f"e{number}"), made.salt, made.text, label)
        lines.append(ingest.Line(number + 1, record, owner, ()))
    ingest.ingest(world.pool, world.context.artifacts, world.secrets.partition, held_out, lines)
    world.dataset = people
    with transaction(world.pool) as connection:
        connection.execute(
            "UPDATE model SET evaluation_id = %s WHERE model_id = %s", [held_out.dataset_id, world.model_id]
        )


def model_of(world: World) -> Model:
    with transaction(world.pool) as connection:
        return models.get_model_by_id(connection, world.model_id)


def set_gate(world: World, gate: Gate | None) -> None:
    with transaction(world.pool) as connection:
        policies.set_gate(connection, "tiny", gate, actor=world.actor)


def set_canary(world: World, canary: Canary | None) -> None:
    with transaction(world.pool) as connection:
        policies.set_canary(connection, "tiny", canary, actor=world.actor)


def build(world: World) -> None:
    """Train what is missing, and let it come to the gate."""
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def release(world: World) -> int | None:
    """Train, and all that follows by itself: the version that came of it."""
    build(world)
    return evaluate_model(world.context, world.model_id)


def delete(world: Copy, subject: str) -> UUID:
    """Ask, plan, and find the deletion in effect: nothing else was run in between."""
    request_id = world.ask(subject)
    steps.plan_targets(world.context, world.model_id)
    Barrier(world.pool, margin=0.05).look()
    assert world.states(request_id) in ([("deactivated", None)], [("completed", "no_match")])
    return request_id


def served(world: World, version: int | None = None) -> Assembly:
    """What a version serves, by default the newest."""
    (body,) = world.row(
        "SELECT a.body FROM model m JOIN model_version v ON v.model_id = m.model_id"
        " AND v.version = coalesce(%s, m.version) JOIN assembly a ON a.digest = v.assembly WHERE m.model_id = %s",
        version,
        world.model_id,
    )
    return Assembly.from_json(body)


def depth(world: World, version: int | None = None) -> int:
    return sum(served(world, version).depths)


def trials(world: World) -> list[tuple[str, float | None]]:
    """State and score of all that came to the gate, in the order in which it came."""
    return world.rows("SELECT state, score FROM gate ORDER BY created_at")  # type: ignore[return-value]


def tainted_in(connection: Connection, model: Model, assembly: Assembly) -> set[str]:
    """Stages of the assembly whose lineage holds a record that is out."""
    keys = [member.stage for member in assembly.members if member]
    found = stages.list_by_key(connection, keys, model.recipe_digest)
    return set(plan.tainted(found.values(), stages.list_touched(connection, keys)))


def nothing_tainted_serves(world: World) -> None:
    """Neither the newest version nor the stable one beside it."""
    model = model_of(world)
    with transaction(world.pool) as connection:
        for version in {model.version, model.stable or model.version}:
            assert version >= model.floor
            assert tainted_in(connection, model, served(world, version)) == set()


def receive(connection: Connection, world: World, subject: str) -> UUID:
    """Receive an erasure request in a transaction of the caller's."""
    now = datetime.now(UTC)
    fields: dict[str, Any] = {"received_at": now, "due_at": now + timedelta(days=30), "subject_commitment": bytes(32)}
    alias = subjects.alias_of(world.secrets.pepper, "user", subject)
    new = requests.NewRequest(request_id=uuid4(), kind=Kind.ERASE, actor=world.actor, alias=alias, **fields)
    assert isinstance(requests.receive(connection, new), list)
    return new.request_id
