"""Logits of single stages on a model's evaluation set, and the accuracy that an assembly of them would serve with."""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from service.store import cells, objects
from service.store.artifacts import ArtifactMissingError, LocalArtifacts
from service.store.database import Connection
from shards.assembly import Assembly
from shards.digest import digest_of
from shards.logits import Logits, mean_of_logits


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


def encode(evaluation: Evaluation) -> bytes:
    """Safetensors bytes."""
    tensors = {"labels": evaluation.labels, "logits": evaluation.logits}
    return safetensors.numpy.save(tensors, {"expunge": json.dumps({"root": evaluation.root})})


def decode(data: bytes) -> Evaluation:
    """Read what `encode` wrote."""
    (size,) = struct.unpack_from("<Q", data)
    body = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["expunge"])
    tensors = safetensors.numpy.load(data)
    return Evaluation(body["root"], tensors["logits"], tensors["labels"])


def accuracy(
    connection: Connection, artifacts: LocalArtifacts, dataset_id: UUID | None, assembly: Assembly
) -> float | None:
    """Share of the evaluation set that the assembly answers correctly, from its stages' stored logits.

    None where there is no evaluation set, no live shard, or a stage that was evaluated on another content.
    """
    keys = [member.stage for member in assembly.members if member]
    if dataset_id is None or not keys:
        return None
    root = evaluation_root(connection, dataset_id)
    names = {found.stage_key: found.object_name for found in objects.list_live(connection, keys, kind="evaluation")}
    found = _read(artifacts, [names.get(key) for key in keys])
    if found is None or any(each.root != root for each in found):
        return None
    answers = mean_of_logits([each.logits for each in found]).argmax(axis=1)
    return float((answers == found[0].labels).mean())


def _read(artifacts: LocalArtifacts, names: Sequence[str | None]) -> list[Evaluation] | None:
    try:
        return [decode(artifacts.get(name)) for name in names if name] if all(names) else None
    except ArtifactMissingError:
        return None
