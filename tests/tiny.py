"""Builders of tiny models and data: a random BERT with a word-level tokenizer, made on the spot."""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from shards.engine.backbone import backbone_digest
from shards.manifest import Record
from shards.recipe import Backbone, Lora, Recipe

WORDS = tuple(f"w{number}" for number in range(96))


def tiny_backbone(directory: Path, *, layers: int = 4, width: int = 32, max_tokens: int = 64) -> Backbone:
    """Save a random BERT and its tokenizer; the same files for the same sizes."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.normalizer = normalizers.Lowercase()
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
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
