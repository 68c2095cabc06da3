"""Stages trained in a measuring process, and the same ones as adapters that plain peft loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data import Shard
from shards import merged
from shards.assembly import Member
from shards.digest import sha256_hex
from shards.engine.interface import Reader
from shards.engine.registry import open_reader, open_trainer
from shards.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Trained:
    """The first order of each shard at full depth, in a reader."""

    reader: Reader
    members: tuple[Member, ...]
    """By shard."""
    lines: tuple[tuple[merged.Tensors, ...], ...]
    """By shard the tensors of its stages, shortest prefix first."""


def train(recipe: Recipe, shards: Sequence[Shard]) -> Trained:
    """Train the first order of each shard."""
    trainer = open_trainer(recipe)
    reader = open_reader(recipe, trainer=trainer)
    members: list[Member] = []
    lines: list[tuple[merged.Tensors, ...]] = []
    for shard in shards:
        made: list[bytes] = []
        stages = shard.chain(recipe, recipe.slice_orders[0])
        for stage in stages:
            made.append(trainer.train(stage, shard.read_by(stage), made))
            reader.load(sha256_hex(made[-1]), made[-1])
        members.append(Member(stages[-1].key, stages[-1].prefix, tuple(map(sha256_hex, made))))
        lines.append(tuple(map(merged.tensors_of, made)))
    return Trained(reader, tuple(members), tuple(lines))


def load(recipe: Recipe, lines: Sequence[Sequence[merged.Tensors]], directory: Path) -> Any:
    """A model of plain peft, with a backbone of its own, of these shards' merged factors: of one shard, its own."""
    from peft import PeftModel  # noqa: PLC0415 - in the child only
    from transformers import AutoModelForSequenceClassification  # noqa: PLC0415

    tensors = merged.merge(lines, merged.lora_scale(recipe))
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(merged.adapter_bytes(tensors))
    (directory / "adapter_config.json").write_bytes(merged.adapter_config(recipe, tensors))
    base = AutoModelForSequenceClassification.from_pretrained(recipe.pretrained.source, num_labels=len(recipe.classes))
    return PeftModel.from_pretrained(base, str(directory)).eval()
