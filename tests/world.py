"""A small installation for tests of the workers: real Postgres, real files, the tiny model; no processes."""

import secrets as random_secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from key_store import file_keys, open_local
from tiny import tiny_recipe, tiny_record

from service.domain.requests import Kind
from service.settings import Settings
from service.store import api_keys, datasets, models, requests, subjects
from service.store.database import Pool, make_pool, transaction
from service.store.datasets import Dataset
from service.store.ingest import Ingested, Line, ingest
from service.store.secrets import Secrets
from shards.manifest import Record
from shards.partition import dataset_key, record_id_of
from shards.recipe import Backbone, Recipe
from workers.context import Context
from workers.sequencer import Sequencer


@dataclass
class Bells:
    """Remembers what was rung; tests decide what is heard."""

    rung: list[tuple[str, tuple[int | str, ...]]] = field(default_factory=list)

    def ring(self, task: str, *ids: int | str) -> None:
        self.rung.append((task, ids))

    def waiting(self, _queue: str) -> int:
        return 0


@dataclass
class World:
    context: Context
    secrets: Secrets
    dataset: Dataset
    recipe: Recipe
    model_id: int
    actor: str
    public_key: bytes
    records: dict[str, list[str]] = field(default_factory=dict)
    """Subject -> the callers' record ids."""

    @property
    def pool(self) -> Pool:
        return self.context.pool

    def line(self, number: int, subject: str, name: str, also: tuple[str, ...] = ()) -> Line:
        key = dataset_key(self.secrets.partition, self.dataset.dataset_id)
        made = tiny_record(name)
        record = Record(record_id_of(key, name), made.salt, made.text, made.label)
        owner, *others = (subjects.alias_of(self.secrets.pepper, "user", each) for each in (subject, *also))
        return Line(number, record, owner, tuple(others))

    def add(self, rows: dict[str, list[str]]) -> Ingested:
        """Ingest records, subject -> record names."""
        named = [(subject, name) for subject, names in rows.items() for name in names]
        lines = [self.line(number, subject, name) for number, (subject, name) in enumerate(named, 1)]
        for subject, names in rows.items():
            self.records.setdefault(subject, []).extend(names)
        return ingest(self.pool, self.context.artifacts, self.secrets.partition, self.dataset, lines)

    def ask(self, subject: str | None = None, **changes: Any) -> UUID:
        """Receive an erasure request as the API does."""
        now = datetime.now(UTC)
        fields: dict[str, Any] = {
            "request_id": uuid4(),
            "kind": Kind.ERASE,
            "actor": self.actor,
            "subject_commitment": random_secrets.token_bytes(32),
            "received_at": now,
            "due_at": now + timedelta(days=30),
        }
        if subject is not None:
            fields["alias"] = subjects.alias_of(self.secrets.pepper, "user", subject)
        new = requests.NewRequest(**(fields | changes))
        with transaction(self.pool) as connection:
            assert isinstance(requests.receive(connection, new), list)
        return new.request_id

    def log(self) -> None:
        """Number, sign and publish what was recorded, as the loops do: certificates wait for it."""
        sequencer = Sequencer(self.pool, self.context.artifacts, self.context.settings)
        sequencer.sequence()
        sequencer.publish()

    def rest(self) -> None:
        """Let the distance between attempts at a stage pass."""
        with transaction(self.pool) as connection:
            connection.execute("UPDATE stage_job SET beat_at = beat_at - interval '1 hour' WHERE state = 'queued'")

    def row(self, query: str, *values: Any) -> tuple[Any, ...]:
        with transaction(self.pool) as connection:
            found = connection.execute(query, values).fetchone()
        assert found is not None
        return found

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with transaction(self.pool) as connection:
            return connection.execute(query, values).fetchall()


def make_world(database: Any, directory: Path, backbone: Backbone, **recipe_changes: Any) -> World:
    """An empty dataset and a model on it."""
    keys = directory / "keys"
    keys.mkdir(mode=0o700)
    signing = Ed25519PrivateKey.generate()
    pem = signing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (keys / "signing.pem").write_bytes(pem)
    (keys / "signing.pem").chmod(0o600)
    settings = Settings(
        database_url=database.app_url,
        artifact_url=f"file://{directory}/artifacts",
        keys_dir=keys,
        job_attempts=2,
        file_keys_url=file_keys(directory / "artifacts"),
    )
    pool = make_pool(database.app_url, size=6)
    pool.open()
    context = Context(settings, pool, open_local(directory / "artifacts"), Bells())
    recipe = tiny_recipe(backbone, **recipe_changes)
    with transaction(pool) as connection:
        token = api_keys.create(connection, "tests", list(api_keys.Scope))
        dataset = datasets.insert_dataset(
            connection,
            name="people",
            shards=recipe.shards,
            slices=recipe.slices,
            classes=list(recipe.classes),
            deletable=True,
            subject_row_cap=100,
            task=recipe.task,
            input=recipe.input,
            width=recipe.module.width if recipe.module else None,
        )
        model_id = models.insert_model(
            connection,
            name="tiny",
            dataset_id=dataset.dataset_id,
            evaluation_id=None,
            recipe=recipe,
            erase_after=timedelta(0),
        )
    public = signing.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    found = Secrets(random_secrets.token_bytes(32), random_secrets.token_bytes(32))
    actor = token.split("_")[1]
    return World(context, found, dataset, recipe, model_id, actor, public)
