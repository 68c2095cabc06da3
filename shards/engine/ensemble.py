"""The ensemble: what an assembly says is served, as tensors. Immutable; another one takes its place by a
pointer.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shards.assembly import Assembly
from shards.assembly import Member as AssemblyMember
from shards.engine.artifacts import Artifact, decode_verified, is_lora
from shards.engine.completion import complete
from shards.engine.generation import next_logits
from shards.engine.inputs import Encoded
from shards.engine.interface import Input
from shards.engine.known import Known, completed
from shards.engine.merged import merge_members
from shards.engine.prompts import Prompts
from shards.engine.sampling import Sampling, Step
from shards.engine.skeleton import Member, Prepared, Skeleton
from shards.errors import ArtifactDigestError, RecipeError, ShardsError
from shards.logits import Logits, mean_of_logits
from shards.merged import lora_scale
from shards.recipe import Recipe

_NOBODY = "no shard has a clean stage: nothing can be answered until one is rebuilt"
_PREFIX = "base_model.model."


class StageTensors:
    """Tensors of verified artefacts, parsed once, by digest. Safe to use from several threads."""

    def __init__(self, recipe: Recipe, *, device: str = "cpu") -> None:
        """For artefacts of `recipe` only."""
        self._recipe = recipe.digest
        self._scale = lora_scale(recipe)
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
        artifact = decode_verified(data, digest, self._recipe)
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
        key: str | None = None
        for depth, digest in enumerate(line.artifacts, 1):
            if (found := self._parsed.get(digest)) is None:
                raise ArtifactDigestError(
                    f"artefact {digest[:12]} is not in memory; add it before building the ensemble"
                )
            artifact, part = found
            if artifact.stage.prefix != line.prefix[:depth] or artifact.stage.parent != key:
                raise ArtifactDigestError(
                    f"artefact {digest[:12]} is of stage {artifact.stage.key[:12]} on slices {artifact.stage.prefix}, "
                    f"not the one that {line.stage[:12]} stands on"
                )
            key = artifact.stage.key
            lora |= part.lora
            head = part.head
        if key != line.stage:
            raise ArtifactDigestError(
                f"the artefacts end in stage {(key or 'none')[:12]}, the assembly names {line.stage[:12]}"
            )
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
        members = tuple(tensors.member(member) for member in assembly.members if member)
        self.live = len(members)
        """Number of live shards."""
        self.members = (merge_members(members),) if members and assembly.aggregation == "merged" else members
        """Tensors of each live shard, or of the one adapter that they were merged into."""
        self._starts = skeleton.starts(self.members)

    def logits(self, inputs: Sequence[Input]) -> Logits:
        """Logits (inputs, outputs); an answer's bits depend on its own input alone.

        Raises:
            ShardsError: no shard is live.
        """
        return self.infer([each for _, each in self.encode(inputs)])

    def encode(self, inputs: Sequence[Input]) -> list[tuple[int, Encoded]]:
        """Each input on its own, with the length at which it runs."""
        return self._skeleton.encode(inputs)

    def infer(self, encoded: Sequence[Encoded], known: Sequence[Known] = ()) -> Logits:
        """Logits (inputs, outputs) of encoded inputs; above the trunk only the layers that each live prefix trained.

        Raises:
            ShardsError: no shard is live.
        """
        if not self.members:
            raise ShardsError(_NOBODY)
        if not known or self.assembly.aggregation == "merged":
            return self.answer(self._skeleton.prepare_encoded(encoded, self._starts))

        def compute(rows: Sequence[int], places: Sequence[int]) -> list[Logits]:
            some = [self.members[place] for place in places]
            prepared = self._skeleton.prepare_encoded([encoded[row] for row in rows], self._skeleton.starts(some))
            return self._skeleton.answer(some, prepared)

        return mean_of_logits(completed([member for member in self.assembly.members if member], known, compute))

    def complete(self, prompt: str, sampling: Sampling = Sampling()) -> Iterator[Step]:  # noqa: B008 - immutable
        """Draw an answer to a prompt, token by token, each from the mean of the live shards' logits.

        Raises:
            RecipeError: the model is not one for completion.
            ShardsError: no shard is live.
        """
        prompts = self._skeleton.backbone.codec
        if not isinstance(prompts, Prompts):
            raise RecipeError(
                f"task: a model for {self._skeleton.recipe.task} completes no text; ask for its prediction"
            )
        if not self.members:
            raise ShardsError(_NOBODY)
        return complete(prompts, next_logits(self._skeleton, self.members), prompt, sampling)

    def answer(self, prepared: Prepared) -> Logits:
        """Logits of inputs that the skeleton prepared, to the same bits.

        Raises:
            ShardsError: no shard is live.
        """
        if not self.members:
            raise ShardsError(_NOBODY)
        return mean_of_logits(self._skeleton.answer(self.members, prepared))


def stage_logits(
    skeleton: Skeleton, tensors: StageTensors, lines: Sequence[AssemblyMember], inputs: Sequence[Input]
) -> list[Logits]:
    """Per stage its own logits (inputs, outputs), by the code that serves.

    `mean_of_logits` over the members of an assembly is what its ensemble answers, bit for bit.
    """
    return skeleton.logits([tensors.member(line) for line in lines], inputs)


class Monolithic:
    """One model on everything, for comparison; in memory only."""

    def __init__(self, skeleton: Skeleton, tensors: StageTensors, trained: Mapping[str, Tensor]) -> None:
        """`trained` as `S3T.train_whole` returns it."""
        self._skeleton = skeleton
        self._member = tensors.member_of(trained)

    def logits(self, inputs: Sequence[Input]) -> Logits:
        """Logits (inputs, outputs)."""
        return self._skeleton.logits([self._member], inputs)[0]
