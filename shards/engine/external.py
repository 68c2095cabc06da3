"""Engine `external`: a training command of the operator's, run on files in a private directory.

The command gets the path of a job file as its last argument:

    {"recipe": path, "stage": {...}, "seed": int, "records": path, "parent": path or null, "output": path}

and writes safetensors to `output`. What it writes is parsed, checked, and written again with the stage in its header,
so that the digest covers stage and tensors alike. Whether it is deterministic is for the caller to find out.
"""

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shards.engine.artifacts import decode, encode
from shards.engine.determinism import stage_seed
from shards.engine.interface import Progress, check_recipe
from shards.engine.scratch import Scratch
from shards.errors import ArtifactDigestError, CommandError
from shards.manifest import Record
from shards.recipe import Recipe
from shards.stages import Stage

BEAT_SECONDS = 0.2
"""How often the command is looked after while it runs."""
THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS",
)  # fmt: skip


class External:
    """The engine of one recipe. Keeps nothing between stages."""

    purity = "external"
    """What the command computes per record is its own affair."""

    def __init__(self, recipe: Recipe, commands: Mapping[str, Sequence[str]] | None = None) -> None:
        """Take the command's program and arguments from those that the operator allows.

        Raises:
            CommandError: the operator allows no command of that name.
        """
        found = (commands or {}).get(recipe.command or "")
        if not found:
            raise CommandError(
                f"command: {recipe.command!r} is not among the commands that this process may run: name it in "
                "EXPUNGE_COMMANDS of the training workers"
            )
        self.recipe = recipe
        self._command = tuple(found)

    @property
    def record_ids(self) -> list[UUID]:
        """None: nothing stays in memory."""
        return []

    def forget(self, record_ids: Iterable[UUID]) -> None:
        """Nothing is held."""

    def clear(self) -> None:
        """Nothing is held."""

    def train(
        self,
        stage: Stage,
        records: Sequence[Record],
        parents: Sequence[bytes],
        progress: Progress | None = None,
    ) -> bytes:
        """Run the command for one stage and return its artefact.

        The command gets the records in the order of the manifests' commitments, and the last parent. What `progress`
        raises while it runs ends it with all its children. For the rest see `Trainer.train`.

        Raises:
            CommandError: the command cannot be started, fails, or writes no valid artefact.
        """
        check_recipe(stage, self.recipe)
        if (len(parents), decode(parents[-1]).stage.key if parents else None) != (stage.depth - 1, stage.parent):
            raise ArtifactDigestError(f"stage {stage.key[:12]} was given artefacts that are not its ancestors'")
        with Scratch() as scratch:
            output = scratch.path / "output.safetensors"
            job = self._job(scratch.path, stage, records, parents, output)
            self._run(scratch, job, progress)
            return encode(stage, _read(output))

    def _job(
        self, directory: Path, stage: Stage, records: Sequence[Record], parents: Sequence[bytes], output: Path
    ) -> Path:
        files = {name: directory / name for name in ("recipe.json", "records.ndjson", "parent.safetensors", "job.json")}
        files["recipe.json"].write_text(json.dumps(self.recipe.to_json()))
        with files["records.ndjson"].open("w", encoding="utf-8") as lines:
            for record in sorted(records, key=lambda record: record.commitment):
                lines.write(json.dumps(_line(record)) + "\n")
        if parents:
            files["parent.safetensors"].write_bytes(parents[-1])
        job = {
            "recipe": str(files["recipe.json"]),
            "stage": {**stage.to_json(), "key": stage.key},
            "seed": stage_seed(self.recipe, stage.shard, stage.prefix),
            "records": str(files["records.ndjson"]),
            "parent": str(files["parent.safetensors"]) if parents else None,
            "output": str(output),
        }
        files["job.json"].write_text(json.dumps(job))
        return files["job.json"]

    def _run(self, scratch: Scratch, job: Path, progress: Progress | None) -> None:
        """Run the command to its end; its output is thrown away, since it may quote what it was given."""
        try:
            process = subprocess.Popen(
                [*self._command, str(job)],
                cwd=scratch.path,
                env=_environment(scratch.path),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a group of its own, to be ended as a whole
            )
        except OSError as error:
            raise CommandError(
                f"command: {self.recipe.command} cannot be started ({error.strerror}): correct EXPUNGE_COMMANDS"
            ) from None
        try:
            scratch.watch(process.pid)
            pause = 0.01
            while not _ended(process.pid):
                if progress:
                    progress(0, 1)
                time.sleep(pause)
                pause = min(2 * pause, BEAT_SECONDS)
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # children that it left behind, too
            code = process.wait()
        if code != 0:
            ended = f"exit code {code}" if code > 0 else f"signal {-code}"
            raise CommandError(
                f"command: {self.recipe.command} ended with {ended}; run it by hand on a job file of made-up records"
            )
        if progress:
            progress(1, 1)


def _ended(pid: int) -> bool:
    """Whether a child has ended; it is not reaped yet, so that its id still names its group and no other."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _line(record: Record) -> dict[str, Any]:
    line = {"record_id": str(record.record_id), "text": record.text, "label": record.label}
    return line | ({"image": base64.b64encode(record.image).decode()} if record.image else {})


def _environment(directory: Path) -> dict[str, str]:
    """The worker's environment without its own settings; one thread; temporary files where they will be removed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXPUNGE_")}
    fixed = dict.fromkeys(THREADS, "1") | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TMPDIR": str(directory),
    }
    return kept | fixed


def _read(output: Path) -> dict[str, Tensor]:
    """The tensors that the command wrote, all of them finite."""
    if output.is_symlink() or not output.is_file():
        raise CommandError("command: it ended without an output file: write safetensors to the job's `output`")
    try:
        tensors = safetensors.torch.load(output.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise CommandError(f"command: its output is no safetensors file ({type(error).__name__})") from None
    if not tensors:
        raise CommandError("command: its output holds no tensor; write at least one")
    bad = sum(not _finite(tensor) for tensor in tensors.values())
    if bad:
        raise CommandError(f"command: {bad} of {len(tensors)} tensors of its output hold a NaN or an infinity")
    return tensors


def _finite(tensor: Tensor) -> bool:
    narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1  # float8 has no `isfinite` of its own
    return bool((tensor.float() if narrow else tensor).isfinite().all())
