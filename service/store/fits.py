"""The accuracy that an assembly of engine `ridge` would serve with: its cells' sums, added and solved as servers do.

Every stage's evaluation holds the evaluation set's features and labels. They are the same for all stages of a recipe;
each keeps its own, so that the last one left can still be previewed.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from service.store import objects
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.database import Connection
from shards.assembly import Member
from shards.digest import sha256_hex
from shards.errors import ShardsError
from shards.sums import Features, Grid, Sums, total


@dataclass(frozen=True, slots=True)
class Questions:
    """An evaluation set as a model server sees it."""

    root: str
    """Which evaluation set: digest over the roots of its cells."""
    grid: Grid
    """How the recipe makes features and weights."""
    features: Features
    """(records, d), by record id."""
    labels: npt.NDArray[np.int64]
    """(records,), index of each record's class."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Where the questions and the sums of an assembly's cells lie."""

    evaluations: tuple[str, ...]
    """Object names, of which one that is there will do."""
    sums: tuple[tuple[str, str | None], ...]
    """(digest, object name) of each cell's sums; no name where they are not at hand."""


def encode(questions: Questions, stage_key: str) -> bytes:
    """Safetensors bytes. The stage's key makes them its own: what is destroyed with a stage must be nowhere else."""
    kind = np.int16 if questions.grid.limit < 2**15 else np.int32
    tensors = {"features": questions.features.astype(kind), "labels": questions.labels}
    body = {"stage": stage_key, "root": questions.root, "grid": questions.grid.to_json()}
    return safetensors.numpy.save(tensors, {"expunge": json.dumps(body)})


def decode(data: bytes) -> Questions:
    """Read what `encode` wrote."""
    (size,) = struct.unpack_from("<Q", data)
    body = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["expunge"])
    tensors = safetensors.numpy.load(data)
    return Questions(body["root"], Grid(**body["grid"]), tensors["features"].astype(np.int32), tensors["labels"])


def find_fit(connection: Connection, members: Sequence[Member]) -> Fit:
    """Where the members' questions and sums lie."""
    keys = [member.stage for member in members]
    evaluated = tuple(found.object_name for found in objects.list_live(connection, keys, kind="evaluation"))
    names = {found.digest: found.object_name for found in objects.list_live(connection, keys, kind="stage")}
    return Fit(evaluated, tuple((member.artifacts[-1], names.get(member.artifacts[-1])) for member in members))


def share(artifacts: Artifacts, fit: Fit, root: str) -> float | None:
    """Share of the evaluation set `root` that the cells answer correctly; the sums are let go at once.

    None where no cell was evaluated on that content, or the sums of one are not at hand or cannot be solved.
    """
    from shards.solver import answers, solve  # noqa: PLC0415 - scipy costs 0.1 s, and most models need none of it

    questions = _questions(artifacts, fit.evaluations, root)
    if questions is None:
        return None
    try:
        sums = total(questions.grid, (_sums(artifacts, digest, name) for digest, name in fit.sums))
        weights = solve(questions.grid, sums)
    except (ArtifactMissingError, ShardsError):
        return None
    given = answers(questions.grid, weights, questions.features)
    return float((given.argmax(axis=1) == questions.labels).mean())


def _questions(artifacts: Artifacts, object_names: Sequence[str], root: str) -> Questions | None:
    """The first evaluation that is there and is of that content."""
    for name in object_names:
        try:
            questions = decode(artifacts.get(name))
        except ArtifactMissingError:
            continue
        if questions.root == root:
            return questions
    return None


def _sums(artifacts: Artifacts, digest: str, object_name: str | None) -> Sums:
    data = artifacts.get(object_name) if object_name else b""
    if sha256_hex(data) != digest:
        raise ArtifactMissingError(digest)  # other bytes are as good as none
    tensors = safetensors.numpy.load(data)
    return Sums(int(tensors["count"][0]), tensors["xtx"], tensors["xty"])
