"""A toy engine and a model made of rows, for tests of the model server.

`python tests/serving_kit.py PORT NAME` is a model server with the toy engine, for tests that stop or kill it.
"""

import itertools
import json
import socket
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import psycopg
from key_store import file_keys, open_local

from service.serving.__main__ import Program, run
from service.settings import Settings
from service.store import api_keys, cells, models, objects, publish
from shards.assembly import Assembly, Member
from shards.digest import canonical, sha256_hex
from shards.engine.known import Known
from shards.errors import ArtifactDigestError, ShardsError
from shards.logits import Logits
from shards.recipe import Backbone, Recipe

RECIPE = Recipe(backbone=Backbone(source="toy", digest="0" * 64), classes=("no", "yes"), shards=2, slices=2, orders=2)


class Tensor:
    """Stands for a stage's weights; can be watched."""

    def __init__(self, weight: float) -> None:
        self.weight = weight


class Plain:
    """What a predictor needs beside its `logits`: every input runs at one length, as it is."""

    def encode(self, inputs: Sequence[Any]) -> list[tuple[int, Any]]:
        return [(0, each) for each in inputs]

    def infer(self, encoded: Sequence[Any], known: Sequence[Known] = ()) -> Logits:  # noqa: ARG002 - of one part
        return self.logits(encoded)  # type: ignore[attr-defined]  # the subclass's


class ToyPredictor(Plain):
    """Logits (0, w * length of the text), w the mean weight: every assembly answers differently."""

    def __init__(self, tensors: Sequence[Tensor], pace: float) -> None:
        self.tensors = list(tensors)
        self.pace = pace

    def logits(self, texts: Sequence[str]) -> Logits:
        if not self.tensors:
            raise ShardsError("no shard is live")
        time.sleep(self.pace)
        mean = sum(tensor.weight for tensor in self.tensors) / len(self.tensors)
        return np.array([[0.0, mean] for _ in texts], np.float32)


class ToyEngine:
    """Artefacts are JSON with one weight; `pace` seconds a pass."""

    pace = 0.0

    def __init__(self, _recipe: Recipe) -> None:
        self._lock = threading.Lock()
        self._tensors: dict[str, Tensor] = {}

    def held(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._tensors)

    def load(self, digest: str, data: bytes) -> None:
        if sha256_hex(data) != digest:
            raise ArtifactDigestError("other bytes; restore the artefact")
        with self._lock:
            self._tensors[digest] = Tensor(json.loads(data)["weight"])

    def drop(self, digests: Iterable[str]) -> list[weakref.ref[Any]]:
        with self._lock:
            return [weakref.ref(self._tensors.pop(digest)) for digest in digests]

    def build(self, assembly: Assembly) -> ToyPredictor:
        with self._lock:
            try:
                tensors = [self._tensors[digest] for m in assembly.members if m for digest in m.artifacts]
            except KeyError:
                raise ArtifactDigestError("not in memory; load it first") from None
        return ToyPredictor(tensors, self.pace)


class HeldPredictor(ToyPredictor):
    """Each pass says that it has begun, and ends when it may."""

    engine: "type[Held]"

    def logits(self, texts: Sequence[str]) -> Logits:
        self.engine.begun.set()
        assert self.engine.go.wait(30)
        return super().logits(texts)


class Held(ToyEngine):
    """`begun` is set when a pass begins, and none ends before `go` is. Make a subclass for each test."""

    begun: ClassVar[threading.Event]
    go: ClassVar[threading.Event]

    def __init_subclass__(cls) -> None:
        cls.begun, cls.go = threading.Event(), threading.Event()

    def build(self, assembly: Assembly) -> ToyPredictor:
        predictor = HeldPredictor(super().build(assembly).tensors, self.pace)
        predictor.engine = type(self)
        return predictor


@dataclass
class Toy:
    """One model in a database: each stage is one artefact and one cell."""

    owner_url: str
    app_url: str
    artifacts: Path
    name: str = "toy"
    recipe: Recipe = RECIPE
    model_id: int = 0
    dataset_id: uuid.UUID = field(default_factory=uuid.uuid4)
    token: str = ""
    stages: dict[str, tuple[str, str]] = field(default_factory=dict)
    """name -> (stage key, digest)."""

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.owner_url)

    def create(self) -> None:
        with self.connect() as connection:
            connection.execute(
                "insert into dataset values (%s, %s, 2, 2, '{no,yes}', true, 100)", (self.dataset_id, self.name)
            )
            cells.insert_grid(connection, self.dataset_id, shards=2, slices=2)
            self.model_id = models.insert_model(
                connection,
                name=self.name,
                dataset_id=self.dataset_id,
                evaluation_id=None,
                recipe=self.recipe,
                erase_after=timedelta(0),
            )
            self.token = api_keys.create(connection, "test", [api_keys.Scope.MODEL_PREDICT])

    def add_stage(self, name: str, *, shard: int, data: bytes, key: str | None = None) -> None:
        """A live artefact whose lineage is generation 0 of the shard's first cell."""
        key = key or sha256_hex(f"{self.name} {name}".encode())
        digest = sha256_hex(data)
        object_name = f"stages/{key}/{digest}/{uuid.uuid4()}"
        open_local(self.artifacts).put(object_name, data)
        with self.connect() as connection:
            connection.execute(
                "insert into stage (stage_key, model_id, shard, prefix, roots) values (%s, %s, %s, %s, %s)",
                (key, self.model_id, shard, [0], ["r"]),
            )
            connection.execute(
                "insert into stage_cell select %s, cell_id, 0 from cell"
                " where dataset_id = %s and shard = %s and slice = 0",
                (key, self.dataset_id, shard),
            )
            objects.insert_platform(connection, "f" * 64, {})
            connection.execute(
                "insert into artifact (object_name, kind, stage_key, fingerprint, digest, state)"
                " values (%s, 'stage', %s, repeat('f', 64), %s, 'live')",
                (object_name, key, digest),
            )
        self.stages[name] = (key, digest)

    def add_toy_stage(self, name: str, weight: float, *, shard: int) -> None:
        self.add_stage(name, shard=shard, data=canonical({"name": name, "weight": weight}))

    def object_path(self, name: str) -> Path:
        with self.connect() as connection:
            query = "select object_name from artifact where stage_key = %s"
            row = connection.execute(query, (self.stages[name][0],)).fetchone()
        assert row is not None
        return self.artifacts / row[0]

    def publish(
        self, *names: str | None, cause: str = "deactivate", taint: int | None = None, beside: int | None = None
    ) -> int:
        """Publish the assembly of these stages; `taint` is a shard whose records are deleted with it, `beside` another
        model that servers hear of with it.
        """
        members = tuple(None if n is None else Member(self.stages[n][0], (0,), (self.stages[n][1],)) for n in names)
        found = publish.Candidate(
            Assembly(self.recipe.digest, members), canonical=False, tainted=frozenset(), served=None, reserve=False
        )
        with self.connect() as connection:
            model = models.lock_model(connection, self.model_id)
            if taint is not None:
                self._taint(connection, taint)
            version = publish.publish(connection, model, found, cause=cause)
            if beside is not None:
                publish.notify(connection, beside)
            return version

    def _taint(self, connection: psycopg.Connection[Any], shard: int) -> None:
        request = uuid.uuid4()
        connection.execute(
            "insert into deletion_request"
            " (request_id, kind, state, subject_commitment, received_at, due_at, created_by)"
            " select %s, 'erase', 'deactivating', %s, now(), now() + interval '1 day', prefix from api_key limit 1",
            (request, bytes(32)),
        )
        connection.execute(
            "insert into tombstone (record_id, dataset_id, cell_id, commitment, added, request_id)"
            " select %s, dataset_id, cell_id, %s, 0, %s from cell where dataset_id = %s and shard = %s and slice = 0",
            (uuid.uuid4(), bytes(32), request, self.dataset_id, shard),
        )

    def leases(self) -> list[dict[str, Any]]:
        with self.connect() as connection, connection.cursor(row_factory=psycopg.rows.dict_row) as cursor:
            query = "select * from lease where model_id = %s order by started_at"
            return cursor.execute(query, (self.model_id,)).fetchall()

    def events(self, kind: str) -> list[dict[str, Any]]:
        with self.connect() as connection:
            query = "select body from event_pending where kind = %s order by id"
            return [row[0] for row in connection.execute(query, (kind,))]

    def settings(self, **changes: Any) -> Settings:
        values = {"lease_ttl_ms": 5000, "drain_ms": 0} | changes
        return Settings(
            database_url=self.app_url,
            artifact_url=self.artifacts.as_uri(),
            file_keys_url=file_keys(self.artifacts),
            **values,
        )

    def environment(self, **changes: Any) -> Mapping[str, str]:
        values = self.settings(**changes)
        return {
            "EXPUNGE_DATABASE_URL": values.database_url,
            "EXPUNGE_ARTIFACT_URL": values.artifact_url,
            "EXPUNGE_FILE_KEYS_URL": values.file_keys_url,
            "EXPUNGE_LEASE_TTL_MS": str(values.lease_ttl_ms),
            "EXPUNGE_DRAIN_MS": str(values.drain_ms),
        }


class Client(httpx.Client):
    """Talks to one model server."""

    def __init__(self, port: int, toy: Toy) -> None:
        super().__init__(
            base_url=f"http://127.0.0.1:{port}",
            headers={"authorization": f"Bearer {toy.token}"},
            timeout=20,
            trust_env=False,
        )
        self.toy = toy

    def predict(self, *texts: str, **headers: str) -> httpx.Response:
        body = {"inputs": list(texts or ("a",))}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.post(f"/v1/models/{self.toy.name}/predict", json=body, headers=sent)

    def version(self) -> int:
        answer = self.predict()
        return int(answer.headers["x-expunge-version"]) if answer.status_code == 200 else 0

    def ready(self) -> bool:
        try:
            return self.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False


def own_ports() -> Iterator[int]:
    """Ports below the system's own range, again and again; no other test process has them: this one keeps the first."""
    for first in range(20_000, 32_000, 1000):
        with suppress(OSError), socket.socket() as keeper:
            keeper.bind(("127.0.0.1", first))
            yield from itertools.cycle(range(first + 1, first + 1000))


PORTS = own_ports()


def free_port() -> int:
    """One that nobody else takes before a server of this process's tests does."""
    for port in PORTS:
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("other test processes have all ports; end them")


def wait_until(condition: Any, *, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


@contextmanager
def serving(
    toy: Toy, *, factory: Any = ToyEngine, settings: Settings | None = None, ready: bool = True
) -> Iterator[tuple[Client, Program]]:
    """A model server in a thread of this process."""
    port = free_port()
    program = Program(settings or toy.settings(), factory, host="127.0.0.1", port=port, name="in-thread")
    thread = threading.Thread(target=program.server.run, name="server")
    thread.start()
    try:
        with Client(port, toy) as client:
            if ready:
                wait_until(
                    lambda: program.server.started and client.ready() and len(program.fleet.statuses() or ()) > 0,
                    seconds=60,
                )
            yield client, program
    finally:
        program.server.should_exit = True
        thread.join()


if __name__ == "__main__":
    sys.exit(run(Settings(), ToyEngine, host="127.0.0.1", port=int(sys.argv[1]), name=sys.argv[2]))
