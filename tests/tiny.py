"""Builders of tiny models and data: a random BERT with a word-level tokenizer, made on the spot."""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any
from uuid import UUID

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from shards.assembly import Assembly
from shards.digest import sha256_hex
from shards.engine.files import backbone_digest
from shards.engine.interface import Trainer, check_lineage
from shards.manifest import Manifest, Record
from shards.plan import ancestry, assemble, missing, tainted
from shards.recipe import Backbone, Lora, Recipe
from shards.stages import CellRoot, Stage

WORDS = tuple(f"w{number}" for number in range(96))


def tiny_tokenizer(*, completion: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; for completion it puts a start token before a text, and knows an end token."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A" if completion else "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    ends = {"bos_token": "[CLS]", "eos_token": "[SEP]"} if completion else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", **ends
    )


def tiny_backbone(
    directory: Path, *, layers: int = 4, width: int = 32, inner: int = 64, max_tokens: int = 64
) -> Backbone:
    """Save a random BERT and its tokenizer; the same files for the same sizes."""
    tiny_tokenizer().save_pretrained(directory)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=inner,
        max_position_embeddings=max_tokens,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(directory)
    return Backbone(source=str(directory), digest=backbone_digest(directory))


def tiny_recipe(backbone: Backbone, **changes: Any) -> Recipe:
    """A recipe that trains a stage of a few records in tens of milliseconds."""
    fields: dict[str, Any] = {
        "backbone": backbone,
        "classes": ("no", "yes"),
        "shards": 2,
        "slices": 2,
        "orders": 2,
        "lora": Lora(rank=4, alpha=8),
        "epochs": 1,
        "batch_size": 4,
        "max_tokens": 16,
        "seed": 7,
    }
    return Recipe(**(fields | changes))


def tiny_record(name: str, words: Sequence[str] | None = None, label: str | None = None) -> Record:
    """A record that is a function of its name."""
    salt = hashlib.sha256(name.encode()).digest()
    text = " ".join(words if words is not None else [WORDS[byte % 96] for byte in salt[: 3 + salt[0] % 12]])
    return Record(uuid.uuid5(uuid.NAMESPACE_OID, name), salt, text, label or ("yes" if salt[1] % 2 else "no"))


def tiny_records(count: int, tag: str = "r") -> list[Record]:
    """`count` records."""
    return [tiny_record(f"{tag}{number}") for number in range(count)]


class World:
    """One model in memory: cells, stages and artefacts, with the deletion and rebuild of the real service."""

    def __init__(self, engine: Trainer, cells: Mapping[tuple[int, int], Sequence[Record]]) -> None:
        self.engine = engine
        self.recipe = engine.recipe
        self.cells = {cell: list(records) for cell, records in cells.items()}
        self.live: dict[str, Stage] = {}
        self.digests: dict[str, str] = {}
        self.artifacts: dict[str, bytes] = {}
        self.manifests: dict[CellRoot, set[UUID]] = {}
        self._remember()

    @property
    def roots(self) -> dict[int, dict[int, str]]:
        grid: dict[int, dict[int, str]] = {}
        for (shard, piece), records in self.cells.items():
            grid.setdefault(shard, {})[piece] = manifest_root(records)
        return grid

    def rebuild(self) -> None:
        for stage in missing(self.recipe, self.roots, self.live.keys()):
            parents = [
                self.artifacts[self.digests[s.key]]
                for s in (ancestry(stage, self.live | {stage.key: stage}) or ())[:-1]
            ]
            records = check_lineage(stage, {piece: self.cells[stage.shard, piece] for piece in stage.prefix})
            artifact = self.engine.train(stage, records, parents)
            digest = sha256_hex(artifact)
            self.live[stage.key], self.digests[stage.key], self.artifacts[digest] = stage, digest, artifact

    def delete(self, gone: AbstractSet[UUID]) -> None:
        touched = {root for root, ids in self.manifests.items() if ids & gone}
        for key in tainted(self.live.values(), touched):
            del self.artifacts[self.digests.pop(key)], self.live[key]
        self.engine.forget(gone)
        self.cells = {cell: [r for r in rs if r.record_id not in gone] for cell, rs in self.cells.items()}
        self._remember()

    def assembly(self) -> Assembly:
        return assemble(self.recipe, self.live, self.digests, self.roots)

    def _remember(self) -> None:
        for (shard, piece), records in self.cells.items():
            root = CellRoot(shard, piece, manifest_root(records))
            self.manifests[root] = {record.record_id for record in records}


def manifest_root(records: Sequence[Record]) -> str:
    """Root of the manifest of these records."""
    return Manifest.of(record.commitment for record in records).root
