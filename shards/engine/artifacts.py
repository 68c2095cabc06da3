"""Artefact files: safetensors with one block's LoRA tensors and a head snapshot, the same bytes for the same
tensors.

Names are those of a peft adapter file, so a chain of artefacts is an ordinary adapter once its tensors are
put together.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shards.digest import canonical, sha256_hex
from shards.errors import ArtifactDigestError
from shards.stages import Stage

METADATA = "expunge"
"""The one metadata key; safetensors writes several keys in random order."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """The parsed file of one stage."""

    stage: Stage
    tensors: Mapping[str, Tensor]
    """By peft name: `...lora_A.weight` (rank, in), `...lora_B.weight` (out, rank), and the head's own."""

    @property
    def lora(self) -> dict[str, Tensor]:
        """The block's LoRA tensors."""
        return {name: tensor for name, tensor in self.tensors.items() if is_lora(name)}

    @property
    def head(self) -> dict[str, Tensor]:
        """The head as it was at the end of the stage."""
        return {name: tensor for name, tensor in self.tensors.items() if not is_lora(name)}


def is_lora(name: str) -> bool:
    """Whether a tensor name is of an adapter, not of the head."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def encode(stage: Stage, tensors: Mapping[str, Tensor]) -> bytes:
    """Artefact bytes; equal tensors give equal bytes."""
    sheet = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(sheet, {METADATA: canonical({"stage": stage.to_json()}).decode()})


def decode(data: bytes) -> Artifact:
    """Parse artefact bytes.

    Raises:
        ArtifactDigestError: not an artefact of Expunge.
    """
    try:
        (size,) = struct.unpack_from("<Q", data)
        body = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][METADATA])["stage"]
        tensors = safetensors.torch.load(data)
    except (struct.error, ValueError, KeyError, SafetensorError) as error:
        message = f"not an artefact of a stage ({error}); restore it or train the stage again"
        raise ArtifactDigestError(message) from None
    stage = Stage(body["recipe"], body["shard"], tuple(body["prefix"]), tuple(body["roots"]), body["parent"])
    return Artifact(stage, tensors)


def decode_verified(data: bytes, digest: str, recipe: str | None = None) -> Artifact:
    """Parse artefact bytes after checking that they are the ones the digest promises; and of which recipe, if given.

    Raises:
        ArtifactDigestError: other bytes, or an artefact of another recipe.
    """
    if (found := sha256_hex(data)) != digest:
        raise ArtifactDigestError(
            f"artefact has digest {found[:12]}, {digest[:12]} was promised: the file is damaged or "
            "replaced; do not serve it, restore it or train the stage again"
        )
    artifact = decode(data)
    if recipe is not None and artifact.stage.recipe != recipe:
        raise ArtifactDigestError(
            f"artefact {digest[:12]} is of recipe {artifact.stage.recipe[:12]}, not of the model's"
        )
    return artifact
