"""`expunge doctor`: a text is found in each kind of place and form and never printed; what is sound, and what not."""

import base64
import bz2
import gzip
import hashlib
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from api_client import write_keys
from conftest import Database
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import example, given
from hypothesis import strategies as st
from key_store import file_keys, open_local
from safetensors.numpy import save

from service.cli.main import main
from service.doctor import formats
from service.doctor.formats import TooDeepError, parts
from service.doctor.forms import Forms
from service.store.secrets import read_secrets
from service.store.subjects import alias_of

CANARY = 'Béa "Ünder" Exämple, 7 Main Street'
OTHER = "Somebody else who lives elsewhere"


def found_in(data: bytes, text: str = CANARY) -> set[str]:
    forms = Forms(text)
    return {form.name for _, part in parts(data) for form in forms.within(part)}


# Forms

ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: text.encode(),
    "utf-16": lambda text: text.encode("utf-16"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "latin-1": lambda text: text.encode("latin-1"),
    "hex": lambda text: text.encode().hex().encode(),
    "HEX": lambda text: text.encode().hex().upper().encode(),
    "base64": lambda text: base64.b64encode(text.encode()),
    "base64 after one": lambda text: base64.b64encode(b"x" + text.encode() + b"yz"),
    "base64 after two": lambda text: base64.b64encode(b"xx" + text.encode() + b"y"),
    "base64url": lambda text: base64.urlsafe_b64encode(text.encode()),
    "json": lambda text: json.dumps({"a": text}).encode(),
    "JSON": lambda text: json.dumps({"a": text}).replace("\\u00e9", "\\u00E9").replace("\\u00dc", "\\u00DC")
                             .replace("\\u00e4", "\\u00E4").encode(),
    "json unescaped": lambda text: json.dumps({"a": text}, ensure_ascii=False).encode(),
    "base64 of json": lambda text: base64.b64encode(json.dumps([{"args": [text]}]).encode()),
    "url": lambda text: quote(text, safe="").encode(),
    "lower": lambda text: text.lower().encode(),
    "sha256": lambda text: hashlib.sha256(text.encode()).digest(),
    "sha256 hex": lambda text: hashlib.sha256(text.encode()).hexdigest().encode(),
    "sha1 in base64": lambda text: base64.b64encode(hashlib.sha1(text.encode(), usedforsecurity=False).digest()),
    "md5 of lower": lambda text: hashlib.md5(text.lower().encode(), usedforsecurity=False).hexdigest().encode(),
}  # fmt: skip


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=list(ENCODINGS))
def test_every_form_is_found_and_no_other_text(encode: Callable[[str], bytes]) -> None:
    data = b"\x00before " + encode(CANARY) + b" after\xff"
    assert Forms(CANARY).within(data)
    assert not Forms(OTHER).within(data)


@given(st.text(min_size=4, max_size=40), st.binary(max_size=7), st.binary(max_size=7))
@example("    ab  ", b"", b"")
def test_base64_is_found_wherever_it_begins(text: str, before: bytes, after: bytes) -> None:
    try:
        forms = Forms(text)
    except (ValueError, UnicodeEncodeError):
        return
    data = base64.b64encode(before + text.strip().encode() + after)
    assert [form for form in forms.within(data) if "Base64 of UTF-8" in form.name] or len(text.strip().encode()) < 5


def test_what_lies_across_the_pieces_of_a_stream_is_found() -> None:
    data = b"x" * 1000 + CANARY.encode() + b"y" * 1000
    for size in (1, 7, 999, 1001, 5000):
        pieces = (data[at : at + size] for at in range(0, len(data), size))
        assert [form.name for form in Forms(CANARY).within_pieces(pieces)] == ["UTF-8"]


@pytest.mark.parametrize("text", ["", "abc", "  a  "])
def test_a_text_that_lies_everywhere_by_chance_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="fewer than 4 bytes"):
        Forms(text)


# Formats


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.txt", data)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("inner")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(data: bytes) -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"text": [f"{n}" for n in range(3000)] + [data.decode("latin-1")], "bytes": [b""] * 3000 + [data]})
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstd,
    "zip": zipped, "tar": tarred, "parquet": parquet,
    "safetensors": lambda data: save({"w": np.arange(3.0)}, {"said": json.dumps({"by": data.decode("latin-1")})}),
}  # fmt: skip
LINE = ("some text before it, " * 40 + CANARY + ", and some after").encode("latin-1")


@pytest.mark.parametrize("pack", PACKED.values(), ids=list(PACKED))
def test_every_format_is_opened_also_inside_another(pack: Callable[[bytes], bytes]) -> None:
    for data in (pack(LINE), gzip.compress(pack(LINE)), zipped(gzip.compress(pack(LINE)))):
        assert found_in(data)
        assert not found_in(data, OTHER)


@pytest.mark.parametrize("pack", PACKED.values(), ids=list(PACKED))
def test_damaged_files_are_read_as_far_as_they_are_whole(pack: Callable[[bytes], bytes]) -> None:
    data = pack(b"nothing of interest" * 90)
    for cut in range(0, len(data), max(1, len(data) // 50)):
        assert not found_in(data[:cut])
        assert found_in(data[:cut] + CANARY.encode())  # as it lies there


def test_bombs_are_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LIMIT_BYTES", 1000)
    with pytest.raises(TooDeepError):
        list(parts(gzip.compress(bytes(1001))))
    data = CANARY.encode()
    for _ in range(formats.DEPTH + 1):
        data = gzip.compress(data)
    with pytest.raises(TooDeepError):
        list(parts(data))


# The command

Doctor = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def home(tmp_path: Path, database: Database, valkey: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installation of the operator's own stores."""
    keys = write_keys(tmp_path / "keys")
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (keys / "signing.pem").write_bytes(pem)
    (keys / "signing.pem").chmod(0o600)
    (tmp_path / "tmp").mkdir()
    for name, value in {
        "DATABASE_URL": database.app_url, "DATABASE_OWNER_URL": database.owner_url, "REDIS_URL": valkey,
        "ARTIFACT_URL": (tmp_path / "artifacts").as_uri(), "FILE_KEYS_URL": file_keys(tmp_path / "artifacts"),
        "KEYS_DIR": str(keys), "FILE_KEY_BACKUP_DAYS": "7",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"EXPUNGE_{name}", value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)
    with redis.Redis.from_url(valkey) as client:
        client.flushall()
        yield tmp_path
        client.flushall()


@pytest.fixture
def doctor(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Exit code, JSON, and everything that was printed in both ways."""
    assert home.is_dir()

    def call(*arguments: str, stdin: str = "") -> tuple[int, dict[str, Any], str]:
        printed = ""
        for extra in ([], ["--json"]):
            monkeypatch.setattr(sys, "argv", ["expunge", "doctor", *arguments, *extra])
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
            with pytest.raises(SystemExit) as ended:
                main()
            out, err = capsys.readouterr()
            printed += out + err
        return int(ended.value.code or 0), json.loads(out) if out else {}, printed

    return call


pytestmark = pytest.mark.integration


def test_an_installation_without_the_text(doctor: Doctor) -> None:
    code, said, printed = doctor("--canary", CANARY)
    assert (code, said["found"], said["unsearched"]) == (0, [], []), said
    assert "found nowhere" in printed
    assert {"postgres", "artifacts", "keys", "file-keys"} <= said["searched"].keys()


def plant_row(home: Path, url: str, _valkey: str) -> str:
    assert home
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE spare (id int, body jsonb, raw bytea, large text)")
        connection.execute("INSERT INTO spare VALUES (1, %s, '', '')", [json.dumps({"deep": [{"er": CANARY}]})])
        connection.execute("INSERT INTO spare VALUES (2, '{}', %s, '')", [b"\x00" + CANARY.encode("utf-16-le")])
        connection.execute("INSERT INTO spare VALUES (3, '{}', '', %s)", ["y" * 200_000 + CANARY])  # out of line
    return "postgres"


def plant_large_object(_home: Path, url: str, _valkey: str) -> str:
    with psycopg.connect(url) as connection:
        connection.execute("SELECT lo_from_bytea(0, %s)", [CANARY.encode()])
    return "postgres"


def plant_statistics(_home: Path, url: str, _valkey: str) -> str:
    """What ANALYZE keeps of values outlives the rows."""
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE spare (a text)")
        connection.execute("INSERT INTO spare SELECT %s FROM generate_series(1, 50)", [CANARY])
        connection.execute("ANALYZE spare")
        connection.execute("DELETE FROM spare")
    return "postgres"


def plant_queue(_home: Path, _url: str, valkey: str) -> str:
    with redis.Redis.from_url(valkey) as client:
        message = {"body": base64.b64encode(json.dumps([[CANARY], {}]).encode()).decode()}
        client.lpush("train", json.dumps(message))
    return "valkey"


def plant_values(_home: Path, _url: str, valkey: str) -> str:
    with redis.Redis.from_url(valkey) as client:
        client.hset("h", "field", gzip.compress(CANARY.encode()))
        client.sadd("s", CANARY)
        client.zadd("z", {CANARY: 1})
        client.xadd("x", {"a": CANARY})
        client.set(f"name {CANARY}", "1")
    return "valkey"


def plant_object(home: Path, _url: str, _valkey: str) -> str:
    open_local(home / "artifacts").put("cells/a/1.parquet", parquet(LINE))
    return "artifacts"


def plant_tensor(home: Path, _url: str, _valkey: str) -> str:
    store = open_local(home / "artifacts")
    store.put("stages/a/b/1.safetensors", PACKED["safetensors"](LINE))
    store.put("stages/a/b/2.safetensors", save({"w": np.frombuffer(CANARY.encode() + b" " * 9, np.uint8)}))
    return "artifacts"


def plant_unsealed(home: Path, _url: str, _valkey: str) -> str:
    open_local(home / "artifacts").files.put("cells/a/.1.parquet.0.part", CANARY.encode())
    return "artifacts"


def plant_ledger(home: Path, _url: str, _valkey: str) -> str:
    open_local(home / "artifacts").put("ledger/tile/entries/000", b"\x00\x10" + json.dumps({"a": CANARY}).encode())
    return "artifacts"


def plant_key(home: Path, _url: str, _valkey: str) -> str:
    (home / "keys" / "notes.txt").write_text(CANARY)
    (home / "file-keys" / "00").mkdir()
    (home / "file-keys" / "00" / "note").write_text(CANARY)
    return "file-keys"


def plant_temporary(home: Path, _url: str, _valkey: str) -> str:
    (home / "tmp" / "expunge-external-x").mkdir()
    (home / "tmp" / "expunge-external-x" / "records.jsonl.gz").write_bytes(gzip.compress(CANARY.encode()))
    return "temporary files"


def plant_file_name(home: Path, _url: str, _valkey: str) -> str:
    (home / "tmp" / f"expunge-{CANARY.replace('/', '')}").mkdir()
    (home / "tmp" / f"expunge-{CANARY.replace('/', '')}" / "file").write_text("")
    return "temporary files"


def plant_log(home: Path, _url: str, _valkey: str) -> str:
    (home / "logs").mkdir()
    (home / "logs" / "api.log").write_text(json.dumps({"message": "oops", "text": CANARY}) + "\n")
    (home / "logs" / "api.log.1.gz").write_bytes(gzip.compress(f"a line\n{CANARY}\n".encode()))
    return "named by --also"


def plant_hash(_home: Path, url: str, _valkey: str) -> str:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE spare (a text, b bytea)")
        digest = hashlib.sha256(CANARY.encode())
        connection.execute("INSERT INTO spare VALUES (%s, %s)", [digest.hexdigest(), digest.digest()])
    return "postgres"


def plant_keyed_hash(home: Path, url: str, _valkey: str) -> str:
    """Somebody who is not on the do-not-train list has no hash here, either."""
    digest = alias_of(read_secrets(home / "keys").pepper, "email", CANARY).digest
    with psycopg.connect(url) as connection:
        connection.execute("WITH s AS (INSERT INTO subject (subject_id) VALUES (gen_random_uuid()) RETURNING *)"
                           " INSERT INTO subject_alias SELECT 'email', %s, subject_id FROM s", [digest])  # fmt: skip
    return "postgres"


PLANTED = [value for name, value in list(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", PLANTED, ids=lambda each: each.__name__)
def test_it_is_found_wherever_it_lies_and_never_printed(
    doctor: Doctor, home: Path, database: Database, valkey: str, plant: Callable[[Path, str, str], str]
) -> None:
    store = plant(home, database.owner_url, valkey)
    also = ["--also", str(home / "logs")] if (home / "logs").exists() else []
    code, said, printed = doctor("--canary", CANARY, *also)
    assert code == 1
    assert store in {each["store"] for each in said["found"]}
    assert not Forms(CANARY).within(printed.encode())
    assert doctor("--canary", OTHER, *also)[0] == 0


def test_each_column_and_value_is_named(doctor: Doctor, home: Path, database: Database, valkey: str) -> None:
    plant_row(home, database.owner_url, valkey)
    plant_values(home, database.owner_url, valkey)
    plant_tensor(home, database.owner_url, valkey)
    places = {each["place"] for each in doctor("--canary", CANARY)[1]["found"]}
    assert {"public.spare.body", "public.spare.raw", "public.spare.large"} <= places
    assert {place.rpartition("of type ")[2].split()[0] for place in places if "of key" in place} == {
        "hash", "set", "zset", "stream", "string",
    }  # fmt: skip
    assert {place.split()[0] for place in places if "stages" in place} >= {
        "stages/a/b/1.safetensors", "stages/a/b/2.safetensors",
    }  # fmt: skip


def test_what_cannot_be_searched_is_no_success(
    doctor: Doctor, home: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("CREATE TABLE closed (a text)")
        connection.execute("REVOKE ALL ON closed FROM expunge_app")
    monkeypatch.delenv("EXPUNGE_DATABASE_OWNER_URL")
    code, said, _ = doctor("--canary", CANARY)
    assert code == 2
    assert "public.closed (InsufficientPrivilege)" in {each["place"] for each in said["unsearched"]}
    monkeypatch.setenv("EXPUNGE_REDIS_URL", f"unix://{home}/nobody.sock")
    (home / "file-keys" / "store").write_text("another store's")
    unsearched = {each["store"] for each in doctor("--canary", CANARY)[1]["unsearched"]}
    assert {"postgres", "valkey", "artifacts"} <= unsearched


def test_the_text_comes_from_a_file_or_stdin_too(doctor: Doctor, home: Path) -> None:
    (home / "notes").write_text(CANARY)
    (home / "canary").write_text(CANARY + "\n")
    assert doctor("--canary-file", str(home / "canary"), "--also", str(home / "notes"))[0] == 1
    assert doctor("--canary", "-", "--also", str(home / "notes"), stdin=CANARY + "\n")[0] == 1
    assert doctor("--canary", "-", "--also", str(home / "notes"), stdin=OTHER)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--canary", "a"], "fewer than 4 bytes"),
        (["--canary", "abcdefgh", "--canary-file", "x"], "exclude each other"),
        (["--canary-file", "none"], "cannot read the canary"),
        (["--canary", "abcdefgh", "--also", "none"], "none is not there"),
    ],
)
def test_what_cannot_be_meant_is_refused(doctor: Doctor, arguments: list[str], message: str) -> None:
    code, _, printed = doctor(*arguments)
    assert code == 1
    assert message in printed


# Checks


def checks(doctor: Doctor) -> dict[str, tuple[bool, str]]:
    code, said, _ = doctor()
    found = {each["name"]: (each["passed"], each["detail"]) for each in said["checks"]}
    assert (code == 0) == said["passed"] == all(passed for passed, _ in found.values())
    return found


def test_a_sound_installation_passes(doctor: Doctor, home: Path, database: Database) -> None:
    store = open_local(home / "artifacts")
    store.put("cells/a/1", b"x")
    with psycopg.connect(database.owner_url) as connection:
        connection.execute("SET session_replication_role = replica")  # no cell is needed here
        connection.execute("INSERT INTO artifact (object_name, kind, cell_id, digest, state)"
                           " VALUES ('cells/a/1', 'cell', 1, repeat('0', 64), 'live')")  # fmt: skip
    found = checks(doctor)
    assert all(passed for passed, _ in found.values()), found
    assert "1 live objects are there with their keys" in found["artefacts"][1]
    store.delete("cells/a/1")
    assert "1 are not there and 1 have no key, as cells/a/1" in checks(doctor)["artefacts"][1]


@pytest.mark.parametrize(
    ("name", "value", "check", "message"),
    [
        ("KEYS_DIR", "/nowhere", "keys", "is missing: restore it"),
        ("DATABASE_OWNER_URL", "postgresql:///nowhere?host=/nowhere", "postgres", "cannot read the schema"),
        ("REDIS_URL", "unix:///nowhere", "redis", "nowhere"),
        ("FILE_KEYS_URL", "file:///nowhere", "key store", "mkdir -m 700"),
        ("FILE_KEYS_URL", "", "key store", "must be file:///directory"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, name: str, value: str, check: str, message: str
) -> None:
    monkeypatch.setenv(f"EXPUNGE_{name}", value)
    passed, detail = checks(doctor)[check]
    assert not passed
    assert message in detail


def test_open_files_and_unstated_backups_are_found(doctor: Doctor, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPUNGE_FILE_KEY_BACKUP_DAYS")
    (home / "keys").chmod(0o750)
    (home / "file-keys").chmod(0o701)
    found = checks(doctor)
    assert {name for name, (passed, _) in found.items() if not passed} == {
        "keys", "key store", "artefacts", "key backups",
    }  # fmt: skip
    for name, advice in (("keys", "chmod 700"), ("key store", "chmod 700"), ("key backups", "0: there are none")):
        assert advice in found[name][1]
