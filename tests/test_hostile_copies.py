"""Copies of database and artefact store from before a deletion, with all keys that still exist: nothing of the person.

Whoever keeps such copies has everything but the destroyed keys. Another person's records, in the same copies, still
open, and with the keys of before the deletion so do the deleted ones: so the looking can find something.
"""

import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import pytest
from world_copies import Copy

from service.doctor.formats import parts
from service.doctor.forms import Forms
from service.evidence.keys import load_signing_key
from service.standalone.postgres import _package
from service.store import ingest
from service.store.artifacts import is_public
from service.store.sealing import KEY_BYTES, unseal
from shards.errors import ArtifactDigestError
from workers import steps
from workers.training import train_queued

pytest_plugins = ("world_fixtures",)
pytestmark = pytest.mark.integration

BEA = "Bea Quillfeather-Umbridge of 7 Sycamore Crescent dislikes every film"
CLEO = "Cleo {} Winterbottom-Ashe keeps seventeen unregistered parrots"
IDENTIFIER = "bea-quillfeather@example.org"


@dataclass(frozen=True)
class Copies:
    """What a hostile party holds."""

    dump: Path
    artifacts: Path
    key_directories: tuple[Path, ...]

    @property
    def keys(self) -> set[bytes]:
        """Everything of a key's length in the key stores, whatever it is called."""
        paths = [path for directory in self.key_directories for path in directory.rglob("*") if path.is_file()]
        return {data for path in paths if len(data := path.read_bytes()) == KEY_BYTES}

    def opened(self) -> dict[str, bytes]:
        """Each object that any of the keys opens, under its name."""
        found: dict[str, bytes] = {}
        for path in self.artifacts.rglob("*"):
            if path.is_file():
                name = path.relative_to(self.artifacts).as_posix()
                data = path.read_bytes()
                if is_public(name):
                    found[name] = data
                for key in () if is_public(name) else self.keys:
                    try:
                        found[name] = unseal(key, name, data)
                    except ArtifactDigestError:
                        continue
        return found

    def tells(self, text: str) -> set[str]:
        """Where the text lies: in the dump, in files as they are, and in all that opens, whatever packs it."""
        forms, found = Forms(text), set[str]()
        for path in (self.dump, *self.artifacts.rglob("*"), *(p for d in self.key_directories for p in d.rglob("*"))):
            if path.is_file() and any(forms.within(data) for _, data in parts(path.read_bytes())):
                found.add(path.name)
        for name, data in self.opened().items():
            if any(forms.within(part) for _, part in parts(data)):
                found.add(name)
        return found


def copies(world: Copy, directory: Path, *, keys: Path) -> Copies:
    """As a backup takes them; `keys` are those of whatever moment."""
    directory.mkdir()
    dump = directory / "dump.sql"
    program = _package() / "pginstall" / "bin" / "pg_dump"
    subprocess.run([program, "--file", dump, "--dbname", world.owner_url], check=True)
    shutil.copytree(world.context.artifacts.files.root, directory / "artifacts")
    return Copies(dump, directory / "artifacts", (keys, world.context.settings.keys_dir))


def cell_of(world: Copy, record_id: UUID) -> int:
    return world.row("SELECT cell_id FROM record WHERE record_id = %s", record_id)[0]


def train(world: Copy) -> None:
    steps.rebuild_model(world.context, world.model_id)
    train_queued(world.context)
    steps.publish_model(world.context, world.model_id)


def test_nothing_of_a_deleted_person_opens_in_old_copies(world: Copy, tmp_path: Path) -> None:
    people = {IDENTIFIER: BEA, **{f"cleo{number}": CLEO.format(number) for number in range(8)}}
    lines = []
    for number, (subject, text) in enumerate(people.items(), 1):
        line = world.line(number, subject, f"{subject} 1")
        lines.append(replace(line, record=replace(line.record, text=text)))
    ingest.ingest(world.pool, world.context.artifacts, world.secrets.partition, world.dataset, lines)
    train(world)
    cells = [cell_of(world, line.record.record_id) for line in lines]
    other = next(n for n, cell in enumerate(cells) if cell != cells[0])
    cleo = lines[other].record.text
    key_store = world.context.artifacts.files.root.with_name("file-keys")
    shutil.copytree(key_store, tmp_path / "keys-before")
    old = copies(world, tmp_path / "old", keys=key_store)
    before = Copies(old.dump, old.artifacts, (tmp_path / "keys-before",))
    names = set(old.opened())
    assert names == set(before.opened())
    assert old.tells(BEA)
    assert old.tells(cleo)

    request_id = world.ask(IDENTIFIER)
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    assert world.states(request_id) == [("completed", "erased")]
    gone = {name for (name,) in world.rows("SELECT object_name FROM artifact WHERE state = 'destroyed'")}
    new = copies(world, tmp_path / "new", keys=key_store)

    for held in (old, new):
        assert held.tells(BEA) == set()
        assert held.tells(IDENTIFIER) == set()
        assert held.tells(f"{IDENTIFIER} 1") == set()
        assert held.tells(cleo)
    assert load_signing_key(world.context.settings.keys_dir / "signing.pem")  # and no other key of ours is one
    assert {name.partition("/")[0] for name in names & gone} == {"cells", "stages"}
    assert set(old.opened()) == names - gone  # weights that were trained on the person's records are dead, too
    assert [name for name in old.opened() if name.startswith("stages/")]
    assert before.tells(BEA)  # it is the keys that are missing
    assert set(before.opened()) == names


def test_what_is_written_later_under_a_destroyed_key_stays_shut(world: Copy, tmp_path: Path) -> None:
    """A copy that a writer made before the deletion and puts back after it: present, and unreadable."""
    request_id = world.ask("s1")
    names = world.context.artifacts.names(older_than=-60)
    kept = {name: world.context.artifacts.files.get(name) for name in names}
    steps.plan_targets(world.context, world.model_id)
    world.finish(request_id)
    gone = [name for name in names if not world.context.artifacts.exists(name)]
    assert gone
    for name in gone:
        world.context.artifacts.files.put(name, kept[name])
    key_store = world.context.artifacts.files.root.with_name("file-keys")
    assert not set(copies(world, tmp_path / "late", keys=key_store).opened()) & set(gone)
