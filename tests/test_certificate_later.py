"""A certificate held against tree heads and ledgers that an auditor has: later ones, cut ones, edited ones, forks."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from certificate_ledger import ORIGIN, Log, Told, foreign, log_of
from certificate_sample import KEY, OTHER_KEY, PEM, at, sample
from typer.testing import CliRunner

from service.cli.verify import verify as command
from service.evidence.certificate import issue
from service.evidence.keys import Handover, KeySet
from service.evidence.ledger_check import check
from service.evidence.tiles import added_tiles, write_bundle
from service.evidence.verify import Later, verify

app = typer.Typer()
app.command()(command)
BIG = 700
"""Leaves after the certificate: three tiles, the last one partial."""


def after(count: int = BIG) -> list[Told]:
    return [foreign(600 + number, at(100 + number)) for number in range(count)]


def write_log(log: Log, directory: Path, size: int | None = None, *, key: Any = KEY) -> Path:
    """The files of a log of that size (C2SP tlog-tiles)."""
    size = len(log.told) if size is None else size
    directory.mkdir()
    (directory / "checkpoint").write_text(log.checkpoint(size, key))
    for tile in added_tiles(0, size):
        first = tile.number * 256
        for level in (0, -1) if tile.level == 0 else (tile.level,):
            if level > 0:
                data = b"".join(
                    log.tree(size).subtree(k * 256, (k + 1) * 256) for k in range(first, first + tile.width)
                )
            elif level == 0:
                data = b"".join(log.hashes[first : first + tile.width])
            else:
                data = write_bundle([each.leaf for each in log.sealed[first : first + tile.width]])
            path = directory / tile._replace(level=level).path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return directory


@pytest.fixture(scope="module")
def log() -> Log:
    return log_of(sample(), after())[0]


@pytest.fixture
def held(tmp_path: Path, log: Log) -> Path:
    """A certificate, the key, and the ledger as it is later."""
    (tmp_path / "certificate.json").write_text(json.dumps(issue(sample(), KEY)))
    (tmp_path / "signing.pub").write_bytes(PEM)
    write_log(log, tmp_path / "ledger")
    check(lambda name: (tmp_path / "ledger" / name).read_bytes(), KEY.public_key())  # it is a ledger
    return tmp_path


def run(held: Path, *arguments: Any) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the lines about later tree heads."""
    given = [held / "certificate.json", "--key", held / "signing.pub", *arguments, "--json"]
    done = CliRunner().invoke(app, [*map(str, given)])
    assert done.exit_code in {0, 1}, done.output
    checks = json.loads(done.stdout)["checks"]
    assert all(each["passed"] for each in checks if each["name"] != "later tree head")
    return done.exit_code, [each for each in checks if each["name"] == "later tree head"]


def refusal(held: Path, *arguments: Any) -> str:
    code, found = run(held, *arguments)
    (failed,) = [each["detail"] for each in found if not each["passed"]]
    assert code == 1
    return failed


def checkpoint(held: Path, log: Log, size: int, key: Any = KEY) -> Path:
    path = held / f"checkpoint-{size}"
    path.write_text(log.checkpoint(size, key))
    return path


def size_of_certificate() -> int:
    return log_of(sample())[2]


def test_a_later_ledger_continues_the_certificates(held: Path, log: Log) -> None:
    heads = [checkpoint(held, log, size) for size in (3, 8, size_of_certificate(), 100, 256, 257, 512, len(log.told))]
    given = [part for path in heads for part in ("--checkpoint", path)]
    code, found = run(held, "--ledger", held / "ledger", *given)
    assert code == 0, found
    assert [each["strength"] for each in found] == ["re-derived"] * 9
    assert f"size {len(log.told)} with root" in found[0]["detail"]


def test_a_tree_head_alone_is_compared_where_it_can_be(held: Path, log: Log) -> None:
    same = checkpoint(held, log, size_of_certificate())
    assert run(held, "--checkpoint", same)[0] == 0
    assert "give --ledger" in refusal(held, "--checkpoint", checkpoint(held, log, 300))
    garbage = held / "garbage"
    garbage.write_bytes(b"\xff\x00 no tree head")
    assert "not a tree head" in refusal(held, "--checkpoint", garbage)
    assert "garbage" in refusal(held, "--checkpoint", garbage)
    assert "not a checkpoint" in refusal(held, "--checkpoint", garbage, "--ledger", held / "ledger")


def other_history(origin: str = ORIGIN) -> Log:
    """The same events but one, which was left out of this history."""
    told = [each for each in log_of(sample(), after())[0].told if each.kind != "replica.fenced"]
    return Log(told, origin)


def test_a_fork_is_named_with_both_heads(held: Path, log: Log) -> None:
    fork, size = other_history(), size_of_certificate()
    ours = f"size {size} with root {log.tree(size).root().hex()}"
    path = checkpoint(held, fork, size)
    for given in (("--checkpoint", path), ("--ledger", write_log(fork, held / "fork"))):
        said = refusal(held, *given)
        theirs = fork.tree(size if given[1] == path else len(fork.told)).root().hex()
        assert said.startswith("FORK: ")
        assert ours in said
        assert theirs in said
    later = checkpoint(held, fork, 400)
    said = refusal(held, "--checkpoint", later, "--ledger", held / "ledger")
    assert said.startswith("FORK: ")
    assert fork.tree(400).root().hex() in said


def test_another_instances_ledger_is_told_apart(held: Path) -> None:
    other = write_log(other_history("expunge/another"), held / "another")
    assert "the log expunge/another, and the certificate of the log expunge/sample" in refusal(held, "--ledger", other)
    forged = write_log(log_of(sample(), after())[0], held / "forged", key=OTHER_KEY)
    assert "no signature of expunge/sample" in refusal(held, "--ledger", forged)
    size = size_of_certificate()
    found = KeySet(KEY.public_key(), (Handover.sign(KEY, OTHER_KEY.public_key(), size),))
    (held / "keys.json").write_text(json.dumps(found.to_json()))
    assert run(held, "--key", held / "keys.json", "--ledger", forged)[0] == 0  # a key that was rotated
    later = KeySet(KEY.public_key(), (Handover.sign(KEY, OTHER_KEY.public_key(), 10_000),))
    (held / "keys.json").write_text(json.dumps(later.to_json()))
    assert "no signature of expunge/sample" in refusal(held, "--key", held / "keys.json", "--ledger", forged)


def test_a_cut_ledger_is_told(held: Path, log: Log) -> None:
    short = write_log(log, held / "short", size_of_certificate() - 3)
    assert "the ledger was cut" in refusal(held, "--ledger", short)
    path = checkpoint(held, log, len(log.told))
    code, found = run(held, "--ledger", write_log(log, held / "middle", 300), "--checkpoint", path)
    assert (code, [each["passed"] for each in found]) == (1, [True, False])
    assert "the ledger was cut" in found[1]["detail"]
    assert f"size {len(log.told)} " in found[1]["detail"]
    assert "size 300 " in found[1]["detail"]


def missing(directory: Path) -> None:
    (directory / "tile/0/000").unlink()


def cut(directory: Path) -> None:
    path = directory / "tile/0/000"
    path.write_bytes(path.read_bytes()[:-40])


def no_bundle(directory: Path) -> None:
    (directory / "tile/entries/000").unlink()


def no_checkpoint(directory: Path) -> None:
    (directory / "checkpoint").unlink()


def edited_hash(directory: Path) -> None:
    path = directory / "tile/1/000.p/2"
    path.write_bytes(bytes(32) + path.read_bytes()[32:])


def edited_edge(directory: Path) -> None:
    (path,) = (directory / "tile/0/002.p").iterdir()
    path.write_bytes(bytes(32) + path.read_bytes()[32:])


def edited_leaf_hash(directory: Path) -> None:
    path = directory / "tile/0/000"
    path.write_bytes(bytes(32) + path.read_bytes()[32:])


def edited_entry(directory: Path) -> None:
    path = directory / "tile/entries/000"
    path.write_bytes(path.read_bytes().replace(b"target.deactivated", b"target.deactivatee"))


def reordered(directory: Path) -> None:
    leaves = [each.leaf for each in log_of(sample(), after())[0].sealed[:256]]
    leaves[9], leaves[10] = leaves[10], leaves[9]
    (directory / "tile/entries/000").write_bytes(write_bundle(leaves))


def edited_head(directory: Path) -> None:
    path = directory / "checkpoint"
    path.write_text(path.read_text().replace(f"\n{len(log_of(sample(), after())[0].told)}\n", "\n500\n"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "tile/0/000 is missing or cut"),
        (cut, "tile/0/000 is missing or cut"),
        (no_bundle, "tile/entries/000 is missing or cut"),
        (no_checkpoint, "there is no checkpoint"),
        (edited_hash, "one was edited"),
        (edited_leaf_hash, "tile/0/000 or the tile above was edited"),
        (edited_entry, "the ledger holds another entry here"),
        (edited_edge, "one was edited"),
        (reordered, "the ledger holds another entry here"),
        (edited_head, "is missing or cut"),
    ],
)
def test_a_damaged_ledger_is_told(held: Path, damage: Callable[[Path], None], words: str) -> None:
    shutil.copytree(held / "ledger", held / "damaged")
    damage(held / "damaged")
    said = refusal(held, "--ledger", held / "damaged")
    assert words in said, said


def test_files_that_are_not_there_say_so(held: Path) -> None:
    for arguments, words in (
        (("--ledger", held / "none"), "is not a directory"),
        (("--checkpoint", held / "none"), "cannot read the checkpoint"),
        (("--supplements", held / "none"), "cannot read the supplements"),
        (("--supplements", held / "signing.pub"), "holds no supplements"),
        (("--recipe", held / "signing.pub"), "give --artifacts and --file-keys"),
    ):
        given = [held / "certificate.json", "--key", held / "signing.pub", *arguments]
        done = CliRunner().invoke(app, [*map(str, given)])
        assert done.exit_code == 2, done.output
        assert words in done.output


def test_a_certificate_without_a_tree_head_fails_as_such(held: Path) -> None:
    (held / "certificate.json").write_text(json.dumps({"payload": base64.b64encode(b"{}").decode()}))
    done = CliRunner().invoke(
        app,
        [
            str(held / "certificate.json"),
            "--key",
            str(held / "signing.pub"),
            "--ledger",
            str(held / "ledger"),
        ],
    )
    assert done.exit_code == 1
    assert "FAILED  envelope" in done.output


def test_the_path_is_checked_and_not_believed(log: Log) -> None:
    size, envelope = size_of_certificate(), issue(sample(), KEY)
    whole = log.checkpoint(len(log.told))
    path = log.tree(len(log.told)).consistency(size)

    def passed(path: Any, text: str = whole) -> bool:
        return verify(envelope, PEM, later=[Later("head", text, path)])[-1].passed

    assert passed(path)
    assert not passed([])
    assert not passed(None)
    assert not passed(path[1:])
    assert not passed([*path, path[0]])
    assert not passed([bytes(32), *path[1:]])
    assert not passed(path, log.checkpoint(len(log.told) - 1))
