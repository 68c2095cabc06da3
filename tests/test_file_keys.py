"""One key per file: what opens, what no longer does, and what a crash or a wrong directory may not do."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from key_store import file_keys, open_local

from service.store import file_keys as key_module
from service.store.artifacts import KEY_STORE, ArtifactMissingError, Artifacts, open_artifacts
from service.store.directory import Directory
from service.store.file_keys import FileKeys, FileKeysError, open_file_keys
from service.store.sealing import CHUNK_BYTES, MAGIC, SALT_BYTES, TAG_BYTES, seal, unseal
from shards.errors import ArtifactDigestError

KEY, OTHER = b"k" * 32, b"o" * 32
HEADER = len(MAGIC) + SALT_BYTES
SECRET = b"Bea Example lives in Main Street"


@pytest.fixture
def store(tmp_path: Path) -> Artifacts:
    return open_local(tmp_path / "artifacts")


def keys_of(store: Artifacts) -> FileKeys:
    return FileKeys(store.files.root.with_name("file-keys"))


def everything_below(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file())


# Sealing


@given(st.binary(max_size=300), st.text(max_size=30))
def test_what_is_sealed_opens_under_its_key_and_name_alone(data: bytes, name: str) -> None:
    sealed = seal(KEY, name, data)
    assert unseal(KEY, name, sealed) == data
    assert len(sealed) == HEADER + len(data) + TAG_BYTES
    for key, called in ((OTHER, name), (KEY, name + "x")):
        with pytest.raises(ArtifactDigestError):
            unseal(key, called, sealed)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_any_number_of_chunks(size: int) -> None:
    data = os.urandom(size)
    sealed = seal(KEY, "a", data)
    assert unseal(KEY, "a", sealed) == data
    assert len(sealed) == HEADER + size + TAG_BYTES * max(1, -(-size // CHUNK_BYTES))


@settings(max_examples=60)
@given(st.data())
def test_a_changed_bit_is_refused(data: st.DataObject) -> None:
    sealed = bytearray(seal(KEY, "a", SECRET))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ArtifactDigestError):
        unseal(KEY, "a", bytes(sealed))


CHUNK = CHUNK_BYTES + TAG_BYTES


@pytest.mark.parametrize(
    "change",
    [
        lambda head, parts: head + parts[0],
        lambda head, parts: head + parts[0] + parts[1],
        lambda head, parts: head + parts[1] + parts[0] + parts[2],
        lambda head, parts: head + parts[1] + parts[2],
        lambda head, parts: head + parts[0] + parts[2],
        lambda head, parts: head + b"".join(parts) + parts[2],
        lambda head, parts: head + parts[0] + parts[1] + parts[2][:-1],
        lambda head, _parts: head,
        lambda head, _parts: head[:-1],
        lambda _head, _parts: b"",
        lambda _head, _parts: SECRET,
    ],
)
def test_cut_lengthened_and_reordered_files_are_refused(change: Callable[[bytes, list[bytes]], bytes]) -> None:
    sealed = seal(KEY, "a", os.urandom(2 * CHUNK_BYTES) + b"end")
    head, body = sealed[:HEADER], sealed[HEADER:]
    parts = [body[at : at + CHUNK] for at in range(0, len(body), CHUNK)]
    assert head + b"".join(parts) == sealed
    with pytest.raises(ArtifactDigestError):
        unseal(KEY, "a", change(head, parts))


def test_no_two_sealings_share_a_nonce_under_a_key() -> None:
    """The same key, name and bytes give other ciphertext: each sealing derives a key of its own."""
    one, two = seal(KEY, "a", SECRET), seal(KEY, "a", SECRET)
    assert one[len(MAGIC) : HEADER] != two[len(MAGIC) : HEADER]
    assert not {one[at : at + 16] for at in range(HEADER, len(one) - 15)} & {
        two[at : at + 16] for at in range(HEADER, len(two) - 15)
    }
    with pytest.raises(ArtifactDigestError):
        unseal(KEY, "a", two[:HEADER] + one[HEADER:])


# The store


def test_objects_lie_sealed_and_what_the_ledger_publishes_does_not(store: Artifacts) -> None:
    for name in ("cells/a/1.parquet", "stages/k/d/1.safetensors", "evaluations/e", "ledger/openings/000"):
        store.put(name, SECRET)
        assert store.get(name) == SECRET
        assert SECRET not in store.files.get(name)
    for name in ("ledger/tile/0/000", "ledger/checkpoint"):
        store.put(name, SECRET)
        assert store.get(name) == store.files.get(name) == SECRET
    assert keys_of(store).count() == 4
    store.replace("ledger/checkpoint", b"next", expected=SECRET)
    with pytest.raises(ValueError, match="never replaced"):
        store.replace("cells/a/1.parquet", b"next", expected=SECRET)


def test_a_destroyed_key_ends_every_copy_of_its_file_and_no_other(store: Artifacts, tmp_path: Path) -> None:
    store.put("cells/a/1", SECRET)
    store.put("cells/b/2", b"somebody else's")
    shutil.copytree(tmp_path / "artifacts", tmp_path / "backup")
    key = keys_of(store).get("cells/a/1")
    assert key is not None
    store.delete("cells/a/1")
    assert key not in everything_below(tmp_path)
    assert not store.exists("cells/a/1")
    backup = open_artifacts((tmp_path / "backup").as_uri(), file_keys(tmp_path / "artifacts"))
    assert "cells/a/1" in backup.names(older_than=-60)
    with pytest.raises(ArtifactMissingError, match="key was destroyed or lost"):
        backup.get("cells/a/1")
    assert backup.get("cells/b/2") == b"somebody else's"
    assert unseal(key, "cells/a/1", backup.files.get("cells/a/1")) == SECRET  # so it was the key that was missing
    store.delete("cells/a/1")  # again


def test_a_file_under_another_files_name_does_not_open(store: Artifacts) -> None:
    store.put("cells/a/1", SECRET)
    store.put("cells/b/2", b"other")
    path = store.files.path("cells/b/2")
    path.write_bytes(store.files.get("cells/a/1"))
    with pytest.raises(ArtifactDigestError, match="damaged, or is another file"):
        store.get("cells/b/2")


def test_a_writer_that_was_paused_between_key_and_file_uploads_what_nobody_can_read(store: Artifacts) -> None:
    key = keys_of(store).create("cells/a/1")
    sealed = seal(key, "cells/a/1", SECRET)
    store.delete("cells/a/1")
    store.files.put("cells/a/1", sealed)
    assert store.exists("cells/a/1")
    with pytest.raises(ArtifactMissingError):
        store.get("cells/a/1")


@pytest.mark.parametrize("died", ["link", "fsync", "unlink"])
def test_a_put_that_died_is_swept_with_its_key(store: Artifacts, monkeypatch: pytest.MonkeyPatch, died: str) -> None:
    """Wherever it dies: deletion by name leaves neither, and no half object is ever read."""
    for after in range(6):
        name, left, real = f"cells/{died}/{after}", [after], getattr(os, died)

        def dying(*args: object, left: list[int] = left, real: Callable[..., None] = real, **named: object) -> None:
            if left[0] == 0:
                raise SystemExit
            left[0] -= 1
            real(*args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, died, dying)
            with suppress(SystemExit):
                store.put(name, SECRET)
        if store.files.exists(name):
            assert store.get(name) == SECRET
        else:
            with pytest.raises(ArtifactMissingError):
                store.get(name)
        store.delete(name)
        assert not store.exists(name)
        assert [each for each in store.names(older_than=-60) if died in each] == []
    assert keys_of(store).count() == 0
    assert SECRET not in everything_below(store.files.root)


def test_a_deletion_that_died_runs_again(store: Artifacts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, died in enumerate(("fsync", "unlink")):
        name = f"cells/a/{number}"
        store.put(name, SECRET)
        key = keys_of(store).get(name)
        assert key
        with monkeypatch.context() as patch:
            patch.setattr(os, died, lambda *_: (_ for _ in ()).throw(SystemExit()))
            with pytest.raises(SystemExit):
                store.delete(name)
        assert key not in everything_below(tmp_path / "file-keys")  # overwritten is gone, whatever follows
        assert store.exists(name)
        with pytest.raises((ArtifactMissingError, ArtifactDigestError)):
            store.get(name)
        store.delete(name)
        assert not store.exists(name)


def test_an_interrupted_write_of_a_name_takes_its_key_again(store: Artifacts) -> None:
    """Openings have names that say what is in them, so they are written again."""
    first = keys_of(store).create("ledger/openings/000")
    store.put("ledger/openings/000", SECRET)
    assert keys_of(store).get("ledger/openings/000") == first
    assert store.get("ledger/openings/000") == SECRET
    with pytest.raises(FileExistsError):
        store.put("ledger/openings/000", b"other")
    assert store.get("ledger/openings/000") == SECRET


def test_keys_without_files_are_swept_once_they_are_old(store: Artifacts) -> None:
    keys = keys_of(store)
    store.put("cells/here/1", SECRET)
    for name in ("cells/writing/1", "cells/stray/1", "cells/fresh/1"):
        keys.create(name)
    aside = keys.root / "00" / ".00aa.1.part"
    aside.parent.mkdir(exist_ok=True)
    aside.write_bytes(b"x" * 32)
    for path in keys.root.rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    digest = key_module._place("cells/fresh/1")
    os.utime(keys.root / digest)
    assert store.destroy_stray_keys({"cells/writing/1"}, older_than=600) == 2
    assert [keys.get(f"cells/{name}/1") is not None for name in ("here", "writing", "stray", "fresh")] == [
        True, True, False, True,
    ]  # fmt: skip
    assert not aside.exists()
    assert keys.mark


# The wrong key store


def test_the_keys_are_their_owners_alone(store: Artifacts, tmp_path: Path) -> None:
    store.put("cells/a/1", SECRET)
    root = tmp_path / "file-keys"
    paths = list(root.rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in [root, *paths] if path.is_dir()} == {0o700}
    (path,) = [path for path in paths if path.is_file() and path.name != "store"]
    path.chmod(0o640)
    with pytest.raises(FileKeysError, match="chmod 600"):
        store.get("cells/a/1")
    for mode in (0o710, 0o701, 0o750, 0o777):
        root.chmod(mode)
        with pytest.raises(FileKeysError, match="chmod 700"):
            open_local(tmp_path / "artifacts")


def test_a_key_store_that_is_not_there_is_not_an_empty_one(store: Artifacts, tmp_path: Path) -> None:
    """Unmounted it looks empty: every file would look lost, and every key destroyed."""
    store.put("cells/a/1", SECRET)
    root = tmp_path / "file-keys"
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(FileKeysError, match="mkdir -m 700"):
        FileKeys(root)
    root.mkdir(mode=0o700)
    for call in (
        lambda: store.get("cells/a/1"),
        lambda: store.put("cells/b/1", b"x"),
        lambda: store.delete("cells/a/1"),
        lambda: store.exists("cells/none/1"),
    ):
        with pytest.raises(FileKeysError, match="mount it, or restore"):
            call()
    with pytest.raises(FileKeysError, match="does not hold the keys of this artefact store"):
        open_local(tmp_path / "artifacts")
    root.rmdir()
    (tmp_path / "elsewhere").rename(root)
    assert open_local(tmp_path / "artifacts").get("cells/a/1") == SECRET


def test_another_installations_keys_are_refused(store: Artifacts, tmp_path: Path) -> None:
    store.put("cells/a/1", SECRET)
    other = open_local(tmp_path / "other" / "artifacts")
    other.put("cells/a/1", b"x")
    with pytest.raises(FileKeysError, match="does not hold the keys of this artefact store"):
        Artifacts(store.files, keys_of(other))


def test_keys_that_are_in_use_are_no_second_stores(store: Artifacts, tmp_path: Path) -> None:
    """Its reaper would destroy them as nobody's. An unmounted artefact store looks like a second one, too."""
    empty = Directory(tmp_path / "empty")
    store.put("ledger/openings/000", SECRET)
    with pytest.raises(FileKeysError, match="holds the keys of another artefact store"):
        Artifacts(empty, keys_of(store))
    assert empty.names(older_than=-60) == []
    store.delete("ledger/openings/000")  # as after a start that died between the two marks: there is nothing to lose
    assert Artifacts(empty, keys_of(store)).names(older_than=-60) == []
    assert (empty.root / KEY_STORE).read_text() == keys_of(store).mark


def test_an_artefact_store_that_is_not_there_is_not_an_empty_one(store: Artifacts, tmp_path: Path) -> None:
    """Unmounted under a running program: nothing is absent, destroyed, nobody's or written into the empty directory."""
    store.put("ledger/openings/000", SECRET)
    keys, root = keys_of(store), store.files.root
    for path in keys.root.rglob("*"):
        os.utime(path, (0, 0))
    root.rename(tmp_path / "elsewhere")
    root.mkdir()
    for call in (
        lambda: store.get("ledger/openings/000"),
        lambda: store.get("ledger/checkpoint"),
        lambda: store.put("cells/b/1", b"x"),
        lambda: store.exists("cells/b/1"),
        lambda: store.names(older_than=-60),
        lambda: store.names_below("ledger/openings"),
        lambda: store.replace("ledger/checkpoint", b"x", expected=None),
        lambda: store.destroy_stray_keys((), older_than=600),
    ):
        with pytest.raises(OSError, match="the artefact store is not there: mount it"):
            call()
    assert list(root.iterdir()) == []
    root.rmdir()
    (tmp_path / "elsewhere").rename(root)
    assert store.get("ledger/openings/000") == SECRET


@pytest.mark.parametrize("url", ["", "/plain/path", "s3://bucket/x", "file://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="EXPUNGE_FILE_KEYS_URL must be file:///directory"):
        open_file_keys(url)
