"""Stages and their records found from the artefact store's files alone, without a database."""

import json
import struct
from dataclasses import dataclass

from service.store import payloads
from service.store.artifacts import Artifacts
from service.store.payloads import StoredRecord
from shards.digest import sha256_hex
from shards.errors import ArtifactDigestError, ManifestMismatchError
from shards.manifest import Manifest, Record
from shards.stages import Stage


@dataclass(frozen=True, slots=True)
class Files:
    """What lies in an artefact store."""

    stages: dict[str, Stage]
    """By stage key, as each file's own header says and its key confirms."""
    digests: dict[str, tuple[str, ...]]
    """SHA-256 of each stage's files, by stage key: several where platforms differ, or one lies there as evidence."""
    cells: list[list[StoredRecord]]

    def chain(self, stage: Stage) -> list[Stage]:
        """The stage and its ancestors, shortest prefix first.

        Raises:
            LookupError: an ancestor's file is not there.
        """
        line = [stage]
        while (parent := line[-1].parent) is not None:
            if parent not in self.stages:
                raise LookupError(f"stage {stage.key[:12]} stands on {parent[:12]}, whose file is not there")
            line.append(self.stages[parent])
        return line[::-1]

    def records(self, stage: Stage) -> dict[int, list[Record]]:
        """The records of each slice that the stage reads, found by their manifest.

        Raises:
            ManifestMismatchError: no payload file holds them, or one holds sealed records besides.
        """
        return {index: self._of_root(root) for index, root in zip(stage.prefix, stage.roots, strict=True)}

    def _of_root(self, root: str) -> list[Record]:
        for stored in [[], *self.cells]:
            for generation in sorted({each.generation for each in stored}, reverse=True) or [0]:
                records = [each.record for each in stored if each.generation <= generation]
                if Manifest.of(record.commitment for record in records).root == root:
                    return records
        raise ManifestMismatchError(
            f"no payload file holds exactly the records of manifest {root[:12]}: some were erased since, or are sealed"
        )


def find_files(artifacts: Artifacts) -> Files:
    """Read the headers of all stages and the payloads of all cells in the artefact store.

    Raises:
        LookupError: there is no stage at all.
        ArtifactMissingError: a file's key is gone.
        ArtifactDigestError: a file is not what its name says.
        FileKeysError: the key store is not there.
    """
    stages: dict[str, Stage] = {}
    digests: dict[str, tuple[str, ...]] = {}
    for name in artifacts.names_below("stages"):
        if not name.endswith(".safetensors"):
            continue
        data = artifacts.get(name)
        stage = _stage_of(data)
        _, key, digest, _ = name.split("/")
        if stage.key != key or sha256_hex(data) != digest:
            raise ArtifactDigestError(f"{name} is not the stage or has not the digest that its name says")
        stages[key] = stage
        digests[key] = tuple(dict.fromkeys((*digests.get(key, ()), digest)))
    if not stages:
        raise LookupError("the artefact store holds no stages: train the model first")
    return Files(stages, digests, [payloads.decode(artifacts.get(name)) for name in artifacts.names_below("cells")])


def _stage_of(data: bytes) -> Stage:
    (size,) = struct.unpack_from("<Q", data)
    body = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["expunge"])["stage"]
    return Stage(body["recipe"], body["shard"], tuple(body["prefix"]), tuple(body["roots"]), body["parent"])
