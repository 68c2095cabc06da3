"""The ensemble: what an assembly says is served, as tensors. Immutable; another one takes its place by a
pointer.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from shards.assembly import Assembly
from shards.assembly import Member as AssemblyMember
from shards.engine.artifacts import Artifact, decode_verified, is_lora
from shards.engine.skeleton import Member, Skeleton
from shards.errors import ArtifactDigestError, RecipeError, ShardsError
from shards.logits import Logits, mean_of_logits
from shards.recipe import Recipe

_PREFIX = "base_model.model."


class StageTensors:
    """Tensors of verified artefacts, parsed once, by digest. Safe to use from several threads."""

    def __init__(self, recipe: Recipe, *, device: str = "cpu") -> None:
        """For artefacts of `recipe` only."""
        lora = recipe.lora
        self._recipe = recipe.digest
        self._scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
        self._dtype = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        self._device = device
        self._lock = threading.Lock()
        self._parsed: dict[str, tuple[Artifact, Member]] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether the artefact of that digest is in memory."""
        return digest in self._parsed

    def digests(self) -> frozenset[str]:
        """Digests in memory."""
        with self._lock:
            return frozenset(self._parsed)

    def add(self, digest: str, data: bytes) -> None:
        """Verify and parse an artefact; nothing is done for one already there.

        Raises:
            ArtifactDigestError: the bytes are not the digest's, or are of another recipe.
        """
        if digest in self:
            return
        artifact = decode_verified(data, digest)
        if artifact.stage.recipe != self._recipe:
            raise ArtifactDigestError(
                f"artefact {digest[:12]} is of recipe {artifact.stage.recipe[:12]}, not of the model's"
            )
        parsed = (artifact, self.member_of(artifact.tensors))
        with self._lock:
            self._parsed[digest] = parsed

    def discard(self, digests: Iterable[str]) -> None:
        """Forget artefacts; ensembles built from them must be out of service."""
        with self._lock:
            for digest in digests:
                self._parsed.pop(digest, None)

    def member(self, line: AssemblyMember) -> Member:
        """The serving tensors of one shard: every ancestor's block, and the last one's head.

        Raises:
            ArtifactDigestError: an artefact is not in memory, or not the one the assembly means.
        """
        lora: dict[str, tuple[Tensor, Tensor]] = {}
        head: Mapping[str, Tensor] = {}
        key = ""
        for depth, digest in enumerate(line.artifacts, 1):
            if (found := self._parsed.get(digest)) is None:
                raise ArtifactDigestError(
                    f"artefact {digest[:12]} is not in memory; add it before building the ensemble"
                )
            artifact, part = found
            key = artifact.stage.key
            if artifact.stage.prefix != line.prefix[:depth]:
                raise ArtifactDigestError(
                    f"artefact {digest[:12]} is of slices {artifact.stage.prefix}, not {line.prefix[:depth]}"
                )
            lora |= part.lora
            head = part.head
        if key != line.stage:
            raise ArtifactDigestError(f"the artefacts end in stage {key[:12]}, the assembly names {line.stage[:12]}")
        return Member(lora, head)

    def member_of(self, tensors: Mapping[str, Tensor]) -> Member:
        """Serving tensors from tensors under their peft names."""
        lora: dict[str, tuple[Tensor, Tensor]] = {}
        head: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            path = name.removeprefix(_PREFIX)
            if not is_lora(name):
                head[path] = tensor.to(self._device)
            elif path.endswith(".lora_A.weight"):
                up = tensors[name.replace(".lora_A.", ".lora_B.")] * self._scale
                pair = (tensor.to(self._device, self._dtype), up.to(self._device, self._dtype))
                lora[path.removesuffix(".lora_A.weight")] = pair
        return Member(lora, head)


class Ensemble:
    """Mean of the live shards' logits. Safe to use from several threads; passes run one at a time."""

    def __init__(self, skeleton: Skeleton, tensors: StageTensors, assembly: Assembly) -> None:
        """Takes tensors by reference: a fraction of a millisecond.

        Raises:
            RecipeError: assembly and skeleton are of different recipes.
            ArtifactDigestError: see `StageTensors.member`.
        """
        if assembly.recipe != skeleton.digest:
            raise RecipeError(f"the assembly is of recipe {assembly.recipe[:12]}, the model of {skeleton.digest[:12]}")
        self.assembly = assembly
        self._skeleton = skeleton
        self._members = tuple(tensors.member(member) for member in assembly.members if member)

    @property
    def live(self) -> int:
        """Number of live shards."""
        return len(self._members)

    def logits(self, texts: Sequence[str]) -> Logits:
        """Logits (texts, classes); an answer's bits depend on its own text alone.

        Raises:
            ShardsError: no shard is live.
        """
        if not self._members:
            raise ShardsError("no shard has a clean stage: nothing can be answered until one is rebuilt")
        return mean_of_logits(self._skeleton.logits(self._members, texts))


def stage_logits(
    skeleton: Skeleton, tensors: StageTensors, lines: Sequence[AssemblyMember], texts: Sequence[str]
) -> list[Logits]:
    """Per stage its own logits (texts, classes), by the code that serves.

    `mean_of_logits` over the members of an assembly is what its ensemble answers, bit for bit.
    """
    return skeleton.logits([tensors.member(line) for line in lines], texts)


class Monolithic:
    """One model on everything, for comparison; in memory only."""

    def __init__(self, skeleton: Skeleton, tensors: StageTensors, trained: Mapping[str, Tensor]) -> None:
        """`trained` as `S3T.train_whole` returns it."""
        self._skeleton = skeleton
        self._member = tensors.member_of(trained)

    def logits(self, texts: Sequence[str]) -> Logits:
        """Logits (texts, classes)."""
        return self._skeleton.logits([self._member], texts)[0]
