"""Logits of single stages on a model's evaluation set, and the accuracy that an assembly of them would serve with."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString
from uuid import UUID

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from psycopg.rows import class_row

from service.store import cells, fits
from service.store.artifacts import ArtifactMissingError, Artifacts
from service.store.database import Connection
from service.store.models import Model
from shards.assembly import Assembly
from shards.digest import digest_of
from shards.logits import Logits, mean_of_logits

LIST: LiteralString = """
SELECT e.stage_key, e.object_name
FROM unnest(%(stage_keys)s::text[], %(digests)s::text[]) q (stage_key, digest)
JOIN artifact a ON a.stage_key = q.stage_key AND a.kind = 'stage' AND a.digest = q.digest AND a.state = 'live'
JOIN artifact e ON e.stage_key = q.stage_key AND e.kind = 'evaluation' AND e.fingerprint = a.fingerprint
     AND e.state = 'live'
ORDER BY e.stage_key, e.object_name
"""

_UNFIT = "no cell was evaluated on today's evaluation set, or the sums of one are not at hand"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A measured accuracy, or why there is none."""

    share: float | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Answers:
    """Where the stored answers of an assembly to the evaluation set lie."""

    root: str = ""
    """Which evaluation set, as of now."""
    evaluations: tuple[str | None, ...] = ()
    """Object name of each live member's own answers; None where it has none."""
    fit: fits.Fit | None = None
    """Of engine `ridge` instead: what the members' joint answers come from."""
    why: str | None = None
    """Why there is nothing to measure."""


@dataclass(frozen=True, slots=True)
class _Stored:
    stage_key: str
    object_name: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One stage's answers to the evaluation set."""

    root: str
    """Which evaluation set: digest over the roots of its cells."""
    logits: Logits
    """(records, classes), by record id."""
    labels: npt.NDArray[np.int64]
    """(records,), index of each record's class."""


def evaluation_root(connection: Connection, dataset_id: UUID) -> str:
    """Names the content of an evaluation set today."""
    grid = cells.list_grid(connection, dataset_id)
    return digest_of({"cells": [[cell.shard, cell.slice, cell.root] for cell in grid]})


def encode(evaluation: Evaluation, stage_key: str) -> bytes:
    """Safetensors bytes. The stage's key makes them its own: what is destroyed with a stage must be nowhere else."""
    tensors = {"labels": evaluation.labels, "logits": evaluation.logits}
    return safetensors.numpy.save(tensors, {"expunge": json.dumps({"stage": stage_key, "root": evaluation.root})})


def decode(data: bytes) -> Evaluation:
    """Read what `encode` wrote."""
    (size,) = struct.unpack_from("<Q", data)
    body = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["expunge"])
    tensors = safetensors.numpy.load(data)
    return Evaluation(body["root"], tensors["logits"], tensors["labels"])


def find_answers(connection: Connection, model: Model, assembly: Assembly) -> Answers:
    """What an assembly's accuracy is measured from; `measure` reads it, outside of the transaction."""
    if why := _unmeasured(model):
        return Answers(why=why)
    members = [member for member in assembly.members if member]
    if not members or model.evaluation_id is None:
        return Answers(why="no shard would answer")
    root = evaluation_root(connection, model.evaluation_id)
    if model.parsed_recipe.rule == "sums":
        return Answers(root, fit=fits.find_fit(connection, members))
    digests = {member.stage: member.artifacts[-1] for member in members}
    with connection.cursor(row_factory=class_row(_Stored)) as cursor:
        rows = cursor.execute(LIST, {"stage_keys": list(digests), "digests": list(digests.values())}).fetchall()
    names = {row.stage_key: row.object_name for row in rows}
    return Answers(root, tuple(names.get(key) for key in digests))


def measure(artifacts: Artifacts, answers: Answers) -> Accuracy:
    """Share of the evaluation set that the assembly answers correctly, from its stages' stored logits: what the mean of
    the served logits gives, to the bit.
    """
    if answers.why:
        return Accuracy(None, answers.why)
    if answers.fit is not None:
        share = fits.share(artifacts, answers.fit, answers.root)
        return Accuracy(share, _UNFIT if share is None else None)
    found = _read(artifacts, answers.evaluations)
    if found is None:
        return Accuracy(None, "a stage was published before there were records to evaluate it on")
    if any(each.root != answers.root for each in found):
        return Accuracy(None, "a stage was evaluated before the evaluation set was extended")
    logits = mean_of_logits([each.logits for each in found])
    return Accuracy(float((logits.argmax(axis=1) == found[0].labels).mean()), None)


def _unmeasured(model: Model) -> str | None:
    """Why stored logits of single stages cannot say how accurate the model's assemblies are."""
    recipe = model.parsed_recipe
    if model.evaluation_id is None:
        return "the model was declared without an evaluation dataset"
    if recipe.engine == "external":
        return "stages of engine external are evaluated where they are served, not here"
    if recipe.task != "classification":
        return f"accuracy is measured for classification; the task is {recipe.task}"
    if recipe.rule == "merged":
        return f"aggregation {recipe.rule} answers with one model of all shards, which is built on a model server only"
    return None


def _read(artifacts: Artifacts, names: Sequence[str | None]) -> list[Evaluation] | None:
    try:
        return [decode(artifacts.get(name)) for name in names if name] if all(names) else None
    except ArtifactMissingError:
        return None
