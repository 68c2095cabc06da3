"""Copies of a small installation, database and files: it is trained once a session, each test breaks its own copy.

The fixtures are in `world_fixtures`.
"""

import os
import random
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from conftest import Database, Server
from key_store import file_keys, open_local
from world import Bells, World, make_world

from service.standalone.postgres import APP
from service.store import datasets, ingest
from service.store.database import make_pool
from service.store.secrets import Secrets
from shards.recipe import Backbone
from workers import steps
from workers.barrier import Barrier
from workers.context import Context

SUBJECTS = {f"s{number}": [f"s{number}r{row}" for row in range(1 + number % 2)] for number in range(24)}


@dataclass
class Copy(World):
    """A world whose owner may be asked for what the programs' role may not do."""

    owner_url: str = ""

    def as_owner(self, statement: str) -> None:
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            connection.execute(statement.encode())

    def finish(self, *request_ids: UUID) -> None:
        """Barrier, erasure and certificates of all targets, as the bells would have it."""
        Barrier(self.pool, margin=0.05).look()
        for step in (steps.erase_target, steps.certify_target):
            self.log()
            for request_id in request_ids:
                for (model_id,) in self.rows("SELECT model_id FROM request_target WHERE request_id = %s", request_id):
                    step(self.context, request_id, model_id)

    def states(self, request_id: UUID) -> list[tuple[str, str | None]]:
        """State and outcome of the request's targets by model."""
        return self.rows(
            "SELECT state, outcome FROM request_target WHERE request_id = %s ORDER BY model_id", request_id
        )

    def shown(self, request_id: UUID) -> tuple[str, str | None]:
        return self.row("SELECT state, outcome FROM deletion_request WHERE request_id = %s", request_id)  # type: ignore[return-value]

    def events(self, kind: str) -> list[dict[str, object]]:
        return [body for (body,) in self.rows("SELECT body FROM event_pending WHERE kind = %s ORDER BY id", kind)]

    def bounds(self) -> tuple[int, int, int]:
        return self.row("SELECT version, floor, cleared FROM model WHERE model_id = %s", self.model_id)  # type: ignore[return-value]

    def active(self, subject: str) -> int:
        """Records that concern the subject and have no open tombstone."""
        alias = self.line(0, subject, "x").owner
        return self.row(
            "SELECT count(*) FROM record_subject JOIN subject_alias a USING (subject_id) WHERE a.digest = %s AND NOT"
            " EXISTS (SELECT FROM tombstone t WHERE t.record_id = record_subject.record_id AND t.lifted_at IS NULL)",
            alias.digest,
        )[0]

    def no_trace_of(self, request_id: UUID) -> None:
        """Neither a stage of any plan of the request, nor a payload of its records, is left in rows or files."""
        plans = self.rows("SELECT plan -> 'stages' FROM request_target WHERE request_id = %s", request_id)
        keys = [key for (stages,) in plans for key in stages or []]
        assert self.rows("SELECT 1 FROM artifact WHERE stage_key = ANY(%s) AND state <> 'destroyed'", keys) == []
        assert [name for name in self.context.artifacts.names(older_than=-60) if name.split("/")[1] in keys] == []
        ids = [
            i for (i,) in self.rows("SELECT record_id FROM deletion_request_record WHERE request_id = %s", request_id)
        ]
        assert ids
        assert self.rows("SELECT 1 FROM record WHERE record_id = ANY(%s)", ids) == []


@dataclass(frozen=True)
class Mould:
    server: Server
    name: str
    directory: Path
    world: World

    @contextmanager
    def copy(self, directory: Path) -> Iterator[Copy]:
        name = f"copy_{uuid.uuid4().hex}"
        self.server.create(name, template=self.name)
        shutil.copytree(self.directory / "artifacts", directory / "artifacts", copy_function=os.link)
        shutil.copytree(self.directory / "file-keys", directory / "file-keys")  # no links: keys are overwritten
        old = self.world.context.settings
        url = self.server.url(APP, name)
        settings = old.model_copy(
            update={
                "database_url": url,
                "artifact_url": f"file://{directory}/artifacts",
                "file_keys_url": file_keys(directory / "artifacts"),
                "ledger_high_water": directory / "tree-head",
            }
        )
        pool = make_pool(url, size=8)
        pool.open()
        context = Context(settings, pool, open_local(directory / "artifacts"), Bells())  # type: ignore[arg-type]
        values = {each.name: getattr(self.world, each.name) for each in fields(World)} | {"context": context}
        try:
            yield Copy(**values, owner_url=self.server.url("", name))
        finally:
            pool.close()
            self.server.drop(name)


@contextmanager
def cast(
    server: Server, template: str, directory: Path, backbone: Backbone, prepare: Callable[[World], None]
) -> Iterator[Mould]:
    """An installation with the same keys, ids and cells each time, put aside for copies."""
    name = f"mould_{uuid.uuid4().hex}"
    server.create(name, template=template)
    numbers = random.Random(7)

    def same_each_time() -> UUID:
        return UUID(int=numbers.getrandbits(128), version=4)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "uuid4", same_each_time)
            patch.setattr(ingest, "uuid4", same_each_time)
            world = make_world(Database(server.url("", name), server.url(APP, name)), directory, backbone)
            world.secrets = Secrets(b"p" * 32, b"q" * 32)
            prepare(world)
        world.pool.close()
        yield Mould(server, name, directory, world)
    finally:
        server.drop(name)


def populate(world: World) -> None:
    """Subjects with records of their own, and one record that concerns three of them."""
    lines = [world.line(1, "ann", "shared", ("bob", "cid")), world.line(2, "bob", "bobs")]
    lines += [world.line(3, subject, name) for subject, names in SUBJECTS.items() for name in names]
    ingest.ingest(world.pool, world.context.artifacts, world.secrets.partition, world.dataset, lines)
