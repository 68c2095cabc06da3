"""Engine `external`: the operator's own training command, its files, and its end."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import World, manifest_root, tiny_record, tiny_records

from shards.engine.artifacts import decode
from shards.engine.external import External
from shards.engine.registry import open_reader, open_trainer
from shards.engine.replay import replay
from shards.engine.scratch import PREFIX, Scratch, reap
from shards.errors import ArtifactDigestError, CommandError, RecipeError
from shards.manifest import Record
from shards.plan import ancestry
from shards.recipe import Recipe
from shards.stages import Stage, chain

COMMAND = [sys.executable, str(Path(__file__).parent / "toy_command.py")]
MODES = (
    "good",
    "noisy",
    "drift",
    "nan",
    "environment",
    "fail",
    "killed",
    "slow",
    "orphan",
    "none",
    "link",
    "junk",
    "empty",
)
COMMANDS = {mode: [*COMMAND, mode] for mode in (*MODES, "pickle")}
CELLS = {0: tiny_records(5, "a"), 1: tiny_records(4, "b")}
CANARY = "canary words of a person"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything temporary of a test in one place, to be seen."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("TOY_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("EXPUNGE_DATABASE_URL", "postgresql://secret")
    return place


def recipe(mode: str = "good", **changes: Any) -> Recipe:
    return Recipe(
        **({"engine": "external", "command": mode, "classes": ("no", "yes"), "shards": 2, "slices": 2} | changes)
    )


def stages(mode: str = "good", cells: dict[int, list[Record]] = CELLS) -> tuple[Stage, ...]:
    return chain(recipe(mode).digest, 0, (0, 1), {piece: manifest_root(records) for piece, records in cells.items()})


def train(mode: str = "good", records: list[Record] | None = None, **more: Any) -> bytes:
    return External(recipe(mode), COMMANDS).train(stages(mode)[0], records or CELLS[0], [], **more)


def test_a_stage_is_what_the_command_wrote_under_the_stages_own_header(temporary: Path) -> None:
    engine = open_trainer(recipe(), commands=COMMANDS)
    first, second = stages()
    once = engine.train(first, CELLS[0], [])
    assert engine.train(first, list(reversed(CELLS[0])), []) == once
    found = decode(once)
    assert found.stage == first
    words = [len(record.text.split()) for record in CELLS[0] if record.label == "yes"]
    assert float(found.tensors["mean"][1, 1]) == pytest.approx(sum(words) / 5)
    child = decode(engine.train(second, [*CELLS[0], *CELLS[1]], [once]))
    assert torch.equal(child.tensors["before"], found.tensors["mean"])
    assert child.tensors["seed"] != found.tensors["seed"]
    assert list(temporary.iterdir()) == []


def test_the_command_sees_one_thread_private_files_and_no_setting_of_ours() -> None:
    tensors = decode(train("environment")).tensors
    seen = {name: int(tensors[name]) for name in ("settings", "threads", "private", "inside")}
    assert seen == {"settings": 0, "threads": 1, "private": 0o700, "inside": 1}


def test_deletion_and_rebuild_end_in_training_from_nothing() -> None:
    cells = {(shard, piece): tiny_records(3, f"x{shard}{piece}") for shard in range(2) for piece in range(2)}
    gone = cells[0, 1][0]
    world = World(External(recipe(), COMMANDS), cells)
    world.rebuild()
    world.delete({gone.record_id})
    world.rebuild()
    without = World(External(recipe(), COMMANDS), {**cells, (0, 1): cells[0, 1][1:]})
    without.rebuild()
    assert world.digests == without.digests
    member = world.assembly().members[0]
    assert member is not None
    line = ancestry(world.live[member.stage], world.live) or ()
    by_slice = {piece: world.cells[0, piece] for piece in (0, 1)}
    assert replay(world.engine, line, by_slice) == list(member.artifacts)


def test_images_go_to_the_command_as_base64() -> None:
    record = Record(tiny_record("i").record_id, b"s" * 32, "", "yes", image=b"\x89PNG")
    engine = External(recipe(input="image"), {"good": [sys.executable, "-c", READ_IMAGE]})
    stage = chain(engine.recipe.digest, 0, (0,), {0: manifest_root([record])})[0]
    assert bytes(decode(engine.train(stage, [record], [])).tensors["image"]) == b"\x89PNG"


READ_IMAGE = """
import base64, json, sys, numpy
from safetensors.numpy import save_file
job = json.load(open(sys.argv[1]))
image = base64.b64decode(json.loads(open(job["records"]).readline())["image"])
save_file({"image": numpy.frombuffer(image, numpy.uint8)}, job["output"])
"""


@pytest.mark.parametrize(
    ("mode", "problem"),
    [
        ("fail", "ended with exit code 3"),
        ("killed", "ended with signal 9"),
        ("nan", "1 of 2 tensors of its output hold a NaN"),
        ("none", "without an output file"),
        ("link", "without an output file"),
        ("junk", "no safetensors file"),
        ("pickle", "no safetensors file"),
        ("empty", "holds no tensor"),
    ],
)
def test_a_command_that_fails_says_so_and_quotes_nothing(
    mode: str, problem: str, temporary: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError, match=problem) as refusal:
        train(mode, [tiny_record("c", CANARY.split(), "yes")])
    error: BaseException | None = refusal.value
    while error is not None:
        assert "canary" not in str(error)
        error = error.__context__
    assert "canary" not in "".join(capfd.readouterr())
    assert list(temporary.iterdir()) == []


def test_commands_come_from_the_operator_alone() -> None:
    for commands in (None, {}, {"other": COMMAND}, {"good": []}):
        with pytest.raises(CommandError, match="EXPUNGE_COMMANDS"):
            External(recipe(), commands)
    with pytest.raises(CommandError, match=r"cannot be started \(No such file or directory\)"):
        External(recipe(), {"good": ["/no/such/program"]}).train(stages()[0], CELLS[0], [])
    with pytest.raises(RecipeError, match="server of yours"):
        open_reader(recipe())


def test_parents_must_be_the_stages_own() -> None:
    engine = External(recipe(), COMMANDS)
    first, second = stages()
    once = engine.train(first, CELLS[0], [])
    for stage, parents in ((second, []), (first, [once]), (second, [once, once])):
        with pytest.raises(ArtifactDigestError, match="ancestors"):
            engine.train(stage, CELLS[0], parents)
    with pytest.raises(RecipeError, match="of recipe"):
        engine.train(stages("noisy")[0], CELLS[0], [])


class CancelledError(Exception):
    """The job was cancelled."""


def pids(path: Path) -> list[int]:
    return [int(pid) for pid in path.read_text().split()]


def wait_for(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_cancellation_ends_the_command_with_its_children(tmp_path: Path, temporary: Path) -> None:
    def cancel(_done: int, _total: int) -> None:
        if (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        train("slow", progress=cancel)
    wait_for(lambda: not any(running(pid) for pid in pids(tmp_path / "pids")))
    assert list(temporary.iterdir()) == []


def test_children_left_behind_end_with_the_command(tmp_path: Path, temporary: Path) -> None:
    train("orphan")
    wait_for(lambda: not any(running(pid) for pid in pids(tmp_path / "pids")))
    assert list(temporary.iterdir()) == []


def test_what_a_killed_worker_left_is_swept_up_at_the_next_start(tmp_path: Path, temporary: Path) -> None:
    program = (
        "import sys, tempfile; sys.path.insert(0, sys.argv[1]); tempfile.tempdir = sys.argv[2]\n"
        "import test_engine_external as t; t.train('slow')"
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(Path(__file__).parent), str(temporary)])
    wait_for(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    assert reap() == 0  # its owner lives
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    (left,) = temporary.glob(PREFIX + "*")
    assert (left / "records.ndjson").exists()
    assert reap() == 1
    assert list(temporary.iterdir()) == []
    wait_for(lambda: not any(running(pid) for pid in pids(tmp_path / "pids")))


def test_sweeping_up_touches_nothing_in_use(temporary: Path) -> None:
    def use() -> None:
        for _ in range(50):
            with Scratch() as scratch:
                (scratch.path / "file").write_text("x")
                assert (scratch.path / "file").read_text() == "x"

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        reap()
    for thread in threads:
        thread.join()
    assert list(temporary.iterdir()) == []
