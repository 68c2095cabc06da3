"""Tiny random backbones of many kinds, made on the spot: ten architectures, three tasks, one mechanism."""

import hashlib
import io
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny import WORDS, tiny_tokenizer

from shards.engine.files import backbone_digest
from shards.manifest import Record
from shards.recipe import Backbone, Lora, Recipe

SIZE = 16
"""Side of a tiny image."""
VOCABULARY = 4 + len(WORDS)


@dataclass(frozen=True)
class Kind:
    """One kind of backbone, and how it is trained."""

    name: str
    config: Callable[[], Any]
    base: str
    """Class in transformers that the files are saved from."""
    targets: tuple[str, ...]
    layers: str
    """Where its layer list is expected."""
    task: str = "classification"
    input: str = "text"
    more: dict[str, Any] = field(default_factory=dict)
    """Further recipe fields."""

    def save(self, directory: Path) -> Backbone:
        """Write the backbone's files; the same for the same kind."""
        torch.manual_seed(0)
        model = getattr(transformers, self.base)(self.config())
        with torch.no_grad():  # a random start is nearly linear: larger weights make layers count
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        model.save_pretrained(directory)
        if self.input == "image":
            processor = {
                "image_processor_type": "ViTImageProcessor",
                "do_resize": True,
                "size": {"height": SIZE, "width": SIZE},
                "do_rescale": True,
                "do_normalize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
            transformers.ViTImageProcessorPil(**processor).save_pretrained(directory)
        else:
            tiny_tokenizer(completion=self.task == "completion").save_pretrained(directory)
        return Backbone(source=str(directory), digest=backbone_digest(directory))

    def recipe(self, backbone: Backbone, **changes: Any) -> Recipe:
        """A recipe of one shard and two slices."""
        fields: dict[str, Any] = {
            "backbone": backbone,
            "task": self.task,
            "input": self.input,
            "classes": ("no", "yes") if self.task == "classification" else (),
            "shards": 1,
            "slices": 2,
            "lora": Lora(rank=2, alpha=8, targets=self.targets),
            "epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_tokens": 16,
            "seed": 7,
        }
        return Recipe(**(fields | self.more | changes))

    def record(self, name: str, label: str | None = None) -> Record:
        """A record that is a function of its name."""
        salt = hashlib.sha256(name.encode()).digest()
        identity = uuid.uuid5(uuid.NAMESPACE_OID, name)
        default = {"classification": "yes" if salt[1] % 2 else "no", "regression": str(salt[1] / 10)}
        text = " ".join(WORDS[byte % 96] for byte in salt[: 3 + salt[0] % 6])
        answer = default.get(self.task, f"{WORDS[salt[2] % 96]} {WORDS[salt[3] % 96]}")
        if self.input == "image":
            return Record(identity, salt, "", label or answer, tiny_image(name))
        return Record(identity, salt, text, label or answer)

    def records(self, count: int, tag: str) -> list[Record]:
        """`count` records."""
        return [self.record(f"{tag}{number}") for number in range(count)]


def tiny_image(name: str, form: str = "PNG") -> bytes:
    """A picture that is a function of its name, larger than the model takes it."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def _text(**own: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0} | sizes | own


def _decoder(**own: Any) -> dict[str, Any]:
    ends = {"bos_token_id": 2, "eos_token_id": 3, "num_key_value_heads": 1}
    return _text(**ends, **own)


def _image(**own: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    return {"image_size": SIZE, "patch_size": 4} | sizes | own


def _llama() -> Any:
    return transformers.LlamaConfig(**_decoder())


def _qwen3() -> Any:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "head_dim": 16}
    return transformers.Qwen3Config(**_decoder(**sliding))


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **ends)


def _distilbert() -> Any:
    sizes = {"dim": 32, "n_layers": 4, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    return transformers.DistilBertConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes)


def _modernbert() -> Any:
    ends = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    return transformers.ModernBertConfig(**_text(local_attention=8, global_attn_every_n_layers=2, **ends))


def _deberta() -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    return transformers.DebertaV2Config(**_text(type_vocab_size=0, position_buckets=8, **relative))


def _jamba() -> Any:
    mixed = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
    return transformers.JambaConfig(**_decoder(num_experts=1, **mixed))


_QV = ("query", "value")
_ATTENTION_AND_MLP = ("q_proj", "v_proj", "gate_proj", "down_proj")
_SCALE = {"scale": {"offset": 12.0, "spread": 8.0}}
KINDS = (
    Kind("bert", lambda: transformers.BertConfig(**_text()), "BertModel", _QV, "bert.encoder.layer"),
    Kind("roberta", lambda: transformers.RobertaConfig(**_text()), "RobertaModel", _QV, "roberta.encoder.layer"),
    Kind("distilbert", _distilbert, "DistilBertModel", ("q_lin", "v_lin"), "distilbert.transformer.layer"),
    Kind("modernbert", _modernbert, "ModernBertModel", ("Wqkv", "mlp.Wo"), "model.layers"),
    Kind("deberta", _deberta, "DebertaV2Model", ("query_proj", "value_proj"), "deberta.encoder.layer"),
    Kind("llama", _llama, "LlamaModel", ("q_proj", "v_proj"), "model.layers"),
    Kind("qwen3", _qwen3, "Qwen3Model", ("q_proj", "v_proj"), "model.layers"),
    Kind("gpt2", _gpt2, "GPT2Model", ("c_attn",), "transformer.h"),
    Kind(
        "vit", lambda: transformers.ViTConfig(**_image()), "ViTModel", ("q_proj", "v_proj"), "vit.layers", input="image"
    ),
    Kind(
        "dinov2",
        lambda: transformers.Dinov2Config(**_image(mlp_ratio=2)),
        "Dinov2Model",
        ("q_proj", "v_proj"),
        "dinov2.encoder.layer",
        input="image",
    ),
    Kind("llama-lm", _llama, "LlamaForCausalLM", _ATTENTION_AND_MLP, "model.layers", "completion"),
    Kind("qwen3-lm", _qwen3, "Qwen3ForCausalLM", _ATTENTION_AND_MLP, "model.layers", "completion"),
    Kind("jamba-lm", _jamba, "JambaForCausalLM", ("q_proj", "in_proj", "down_proj"), "model.layers", "completion"),
    Kind("gpt2-lm", _gpt2, "GPT2LMHeadModel", ("c_attn", "c_fc"), "transformer.h", "completion"),
)
