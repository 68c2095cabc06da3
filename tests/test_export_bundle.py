"""The evidence bundle, unpacked and checked by the commands that its README names; nothing in it names anybody."""

import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
import pypdf
import pytest
from api_client import serving
from pyarrow import parquet
from world_copies import SUBJECTS, Copy

from service.cli.keys import rotate_key
from service.cli.main import main
from service.store import api_keys
from service.store.database import transaction
from workers import steps
from workers.sequencer import Sequencer

pytest_plugins = ["world_fixtures", "api_fixtures"]
pytestmark = pytest.mark.integration
EXPORT = "/v1/audit/export"
Command = Callable[..., tuple[int, str]]


@dataclass
class Site:
    """An installation whose API runs, with one request that was completed and one that is open."""

    world: Copy
    client: httpx.Client
    done: UUID
    open: UUID
    url: str

    def export(self, form: str, **params: str) -> httpx.Response:
        answer = self.client.get(EXPORT, params={"format": form, **params})
        assert answer.status_code == 200, answer.text
        return answer

    def unpack(self, directory: Path, **params: str) -> Path:
        with zipfile.ZipFile(io.BytesIO(self.export("bundle", **params).content)) as archive:
            assert archive.testzip() is None
            archive.extractall(directory)
        return directory


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """A command offline; (exit code, what it printed)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["expunge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return call


@pytest.fixture
def old_keys(world: Copy) -> Iterator[None]:
    """Puts the keys back afterwards: copies of an installation share them."""
    keys_dir = world.context.settings.keys_dir
    kept = {path: path.read_bytes() for path in keys_dir.iterdir() if path.is_file()}
    yield
    for path in keys_dir.iterdir():
        if path in kept:
            path.write_bytes(kept[path])
        elif path.is_file():
            path.unlink()


@pytest.fixture
def site(world: Copy, valkey: str) -> Iterator[Site]:
    settings = world.context.settings
    for name in ("pepper", "partition"):
        path = settings.keys_dir / name
        path.touch(mode=0o600)
        path.write_text(getattr(world.secrets, name).hex())
    (settings.keys_dir / "signing.pub").write_bytes(world.public_key)
    sequencer = Sequencer(world.pool, world.context.artifacts, settings)

    def number() -> None:
        while sequencer.sequence():
            pass
        sequencer.publish()

    done, later = world.ask("s3", reference="CANARY-ticket"), world.ask("s5")
    steps.plan_targets(world.context, world.model_id)
    number()
    for _ in range(3):  # a certificate waits until its events are under a tree head
        world.finish(done)
        number()
    assert world.shown(done) == ("completed", "erased")
    with transaction(world.pool) as connection:
        token = api_keys.create(connection, "test", list(api_keys.Scope))
    with serving(settings.model_copy(update={"redis_url": valkey})) as url:
        headers = {"Authorization": f"Bearer {token}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield Site(world, client, done, later, url)


def test_a_bundle_of_a_range_is_checked_offline(site: Site, tmp_path: Path, command: Command) -> None:
    made = site.unpack(tmp_path / "bundle")
    key = tmp_path / "signing.pub"  # from somewhere else than the archive
    key.write_bytes(site.world.public_key)
    assert (made / "signing.pub").read_bytes() == site.world.public_key

    code, said = command("verify", made / "certificates.jsonl", "--key", key)
    assert (code, "all 1 certificates passed" in said) == (0, True), said
    code, said = command("ledger", "verify", made / "ledger", "--key", key, "--events", made / "events.jsonl")
    assert code == 0, said
    events = [json.loads(line) for line in (made / "events.jsonl").read_text().splitlines()]
    opened = sum(event["opening"] is not None for event in events)
    assert f"{len(events)} events of {made / 'events.jsonl'} are in it, {opened} of them opened" in said
    assert opened > 10
    assert {json.loads(line)["request_id"] for line in (made / "requests.jsonl").read_text().splitlines()} == {
        str(site.done),
        str(site.open),
    }
    assert "expunge verify certificates.jsonl" in (made / "README.md").read_text()


def test_a_bundle_of_one_request_is_checked_offline(site: Site, tmp_path: Path, command: Command) -> None:
    made, key = site.unpack(tmp_path / "bundle", request=str(site.done)), tmp_path / "bundle" / "signing.pub"
    for arguments in (
        ("verify", made / "certificates" / "tiny.json", "--key", key),
        ("ledger", "proof", made / "inclusion-proof.json", "--key", key),
        ("ledger", "verify", made / "ledger", "--key", key, "--events", made / "events.jsonl"),
    ):
        code, said = command(*arguments)
        assert code == 0, said
    events = [json.loads(line) for line in (made / "events.jsonl").read_text().splitlines()]
    kinds = {json.loads(event["leaf"])["kind"] for event in events}
    assert {"request.received", "target.deactivated", "target.completed"} <= kinds
    assert {json.loads(event["opening"])["request_id"] for event in events} == {str(site.done)}
    open_request = site.unpack(tmp_path / "open", request=str(site.open))
    assert not (open_request / "certificates").exists()


def commands_of(readme: str) -> list[list[str]]:
    """The commands that a README names, word by word."""
    lines = [line.removeprefix("    ").split("  #")[0] for line in readme.splitlines() if line.startswith("    ")]
    return [line.split() for line in lines if line.startswith("expunge ")]


@pytest.mark.usefixtures("old_keys")
def test_the_commands_of_the_readme_hold_also_after_the_key_was_changed(
    site: Site, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site.world.context.settings
    for rotated in (False, True):
        if rotated:
            rotate_key(site.world.pool, settings.keys_dir)
            sequencer = Sequencer(site.world.pool, site.world.context.artifacts, settings)
            while sequencer.sequence():
                pass
            sequencer.publish()
        for name, params in (("range", {}), ("one", {"request": str(site.done)})):
            made = site.unpack(tmp_path / f"{name} {rotated}", **params)
            monkeypatch.chdir(made)
            commands = commands_of((made / "README.md").read_text())
            assert len(commands) == (3 if params else 2)
            for _, *arguments in commands:
                code, said = command(*(each.replace("MODEL", "tiny") for each in arguments))
                assert code == 0, (arguments, said)


def test_what_was_changed_in_a_bundle_fails(site: Site, tmp_path: Path, command: Command) -> None:
    made, key = site.unpack(tmp_path / "bundle"), tmp_path / "bundle" / "signing.pub"
    events = made / "events.jsonl"
    whole = events.read_text()

    def check() -> tuple[int, str]:
        return command("ledger", "verify", made / "ledger", "--key", key, "--events", events)

    lines = [json.loads(line) for line in whole.splitlines()]
    opened = next(line for line in lines if line["opening"] and "s" in line["opening"])
    for wrong, word in (
        ({**opened, "opening": opened["opening"].replace('"salt":"', '"salt":"0')}, "does not open"),
        ({**opened, "index": opened["index"] + 1}, "another leaf"),
        ({**opened, "index": 10**9}, "another leaf"),
        ({**opened, "leaf": opened["leaf"].replace("T1", "T0").replace("T0", "T1", 1) + " "}, "another leaf"),
        ({"index": -1, "leaf": "", "opening": None}, "no event of an export"),
        ({"index": 0}, "no event of an export"),
    ):
        events.write_text(json.dumps(wrong) + "\n")
        code, said = check()
        assert (code, word in said) == (1, True), said
    events.write_text(whole)
    assert check()[0] == 0

    certificates = made / "certificates.jsonl"
    body = json.loads(certificates.read_text())
    body["certificate"]["signatures"][0]["sig"] = "A" * 86 + "=="
    of_another = json.loads(certificates.read_text()) | {"request_id": str(site.open)}
    lines = [json.dumps(body), "{}", json.dumps(of_another)]
    certificates.write_text(certificates.read_text() + "\n".join(lines) + "\n")
    code, said = command("verify", certificates, "--key", key)
    assert code == 1
    assert "3 of 4 certificates FAILED" in said
    assert f"FAILED  {site.open} tiny  line: the certificate is of {site.done} tiny" in said
    assert f"FAILED  {site.done} tiny  signature" in said
    assert "line 3" in said
    code, said = command("verify", certificates, "--key", key, "--ledger", made / "ledger")  # is not passed over
    assert (code, "one certificate" in said) == (2, True)


def test_a_bundle_about_nothing_is_valid(site: Site, tmp_path: Path, command: Command) -> None:
    none = {"from": "2020-01-01", "to": "2020-01-01"}
    assert site.export("bundle", **none).headers["X-Expunge-Empty"] == "true"
    made = site.unpack(tmp_path / "bundle", **none)
    for name in ("requests", "targets", "certificates", "events"):
        assert (made / f"{name}.jsonl").read_bytes() == b""
    assert "No request was received in this range" in (made / "README.md").read_text()
    key = made / "signing.pub"
    assert command("ledger", "verify", made / "ledger", "--key", key, "--events", made / "events.jsonl")[0] == 0
    code, said = command("verify", made / "certificates.jsonl", "--key", key)
    assert (code, "nothing was checked" in said) == (0, True), said


def test_the_certificate_as_a_page_has_the_signed_file_inside(site: Site, tmp_path: Path, command: Command) -> None:
    path = f"/v1/deletion-requests/{site.done}/certificate"
    envelope = site.client.get(path)
    assert envelope.headers["Content-Type"] == "application/vnd.dsse.envelope.v1+json"
    by_format = site.client.get(path, params={"format": "pdf"})
    by_accept = site.client.get(path, headers={"Accept": "application/pdf"})
    assert by_format.headers["Content-Type"] == by_accept.headers["Content-Type"] == "application/pdf"
    assert by_format.content == by_accept.content
    assert site.client.get(path, params={"format": "json"}, headers={"Accept": "application/pdf"}).json()["payload"]
    reader = pypdf.PdfReader(io.BytesIO(by_format.content))
    assert len(reader.pages) == 1
    inside = tmp_path / "certificate.json"
    inside.write_bytes(reader.attachments["certificate.json"][0])
    assert json.loads(inside.read_text()) == envelope.json()
    key = tmp_path / "signing.pub"
    key.write_bytes(site.world.public_key)
    assert command("verify", inside, "--key", key)[0] == 0
    assert site.client.get(path.replace(str(site.done), str(site.open)), params={"format": "pdf"}).status_code == 404


RECORD = re.compile(
    rb"(?<![A-Za-z0-9+/])(?:%s)(?![A-Za-z0-9+/])"
    % b"|".join(name.encode() for names in SUBJECTS.values() for name in names)
)
"""A record's name, not within a longer word: base64 has any four letters by chance."""


def test_no_export_holds_an_identifier_or_a_callers_text(site: Site) -> None:
    """Subjects, record ids and texts of the installation, the caller's reference, hashes of identifiers."""
    world = site.world
    canaries = {b"CANARY", b"ticket"} | {f'"{subject}"'.encode() for subject in SUBJECTS}
    rows = world.rows("SELECT digest FROM subject_alias")
    canaries |= {bytes(digest).hex().encode() for (digest,) in rows}
    canaries |= {str(subject).encode() for (subject,) in world.rows("SELECT subject_id FROM subject")}
    files: dict[str, bytes] = {}
    for what in ("requests", "targets", "events"):
        for form in ("jsonl", "csv"):
            files[f"{what} {form}"] = site.export(form, what=what).content
        table = parquet.read_table(io.BytesIO(site.export("parquet", what=what).content))
        files[f"{what} parquet"] = json.dumps(table.to_pylist(), default=str).encode()
    for params in ({}, {"request": str(site.done)}):
        with zipfile.ZipFile(io.BytesIO(site.export("bundle", **params).content)) as archive:
            files |= {f"bundle {name}": archive.read(name) for name in archive.namelist()}
    reader = pypdf.PdfReader(io.BytesIO(site.export("pdf").content))
    files["pdf"] = "".join(page.extract_text() for page in reader.pages).encode()
    files["pdf json"] = reader.attachments["report.json"][0]
    assert sum(map(len, files.values())) > 50_000
    assert any(b"CANARY" in bytes(row) for (row,) in world.rows("SELECT reference::bytea FROM deletion_request"
                                                                " WHERE reference IS NOT NULL"))  # fmt: skip
    found = [(name, canary) for name, data in files.items() for canary in canaries if canary in data]
    found += [(name, hit[0]) for name, data in files.items() for hit in [RECORD.search(data)] if hit]
    assert found == []
    assert all(RECORD.search(text % b"s1r0") for text in (b'{"id":"%s"}', b"a,%s\n", b"%s", b"x %s.", b"x-%s_"))


def test_the_report_counts_the_installation(site: Site) -> None:
    reader = pypdf.PdfReader(io.BytesIO(site.export("pdf").content))
    said = json.loads(reader.attachments["report.json"][0])
    assert said["received"] == 2
    assert {group["name"]: group["requests"] for group in said["groups"] if group["requests"]} == {
        "completed": 1,
        "in progress": 1,
    }
    assert said["to_deactivated"]["requests"] == 2
    (year,) = said["years"]
    assert year["counts"] == [2, 1, 0, 0, 0, 1]
    empty = site.export("pdf", to="2020-01-01")
    assert empty.headers["X-Expunge-Empty"] == "true"
    assert "No request was received" in pypdf.PdfReader(io.BytesIO(empty.content)).pages[0].extract_text()


def test_the_commands_write_files(
    site: Site, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_API_URL", site.url)
    monkeypatch.setenv("EXPUNGE_API_KEY", site.client.headers["Authorization"].removeprefix("Bearer "))
    monkeypatch.chdir(tmp_path)
    code, said = command("export", "--format", "csv", "--from", "2026-01-01")
    assert code == 0, said
    assert Path("expunge-requests.csv").read_text().count("\n") == 3
    (ended,) = site.world.events("audit.export_ended")
    assert str(ended["digest"]) in said
    code, said = command("export", "--format", "parquet", "--to", "2020-01-01", "-o", "x.parquet", "--json")
    assert code == 0, said
    assert json.loads(said)["empty"] is True
    assert parquet.read_table("x.parquet").num_rows == 0
    assert command("export", "--format", "pdf", "--request", site.done)[0] == 0
    assert Path("expunge-report.pdf").read_bytes().startswith(b"%PDF-")
    assert command("certificate", site.done, "--pdf", "page.pdf", "-o", "page.json")[0] == 0
    with Path("page.pdf").open("rb") as file:
        inside = pypdf.PdfReader(file).attachments["certificate.json"][0]
    assert json.loads(inside) == json.loads(Path("page.json").read_text())
    for arguments, word in (
        (("--from", "2026-02-01", "--to", "2026-01-01"), "from is after to"),
        (("--request", UUID(int=1)), "no deletion request"),
        (("-o", tmp_path), "is a directory"),
        (("-o", "missing/x"), "cannot be written"),
    ):
        code, said = command("export", "--format", "csv", *arguments)
        assert (code, word in said) == (1, True), said
    with suppress(FileNotFoundError):
        assert not [name for name in tmp_path.iterdir() if name.suffix == ".part"]
