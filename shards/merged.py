"""A whole assembly as one ordinary PEFT adapter: a pure function of clean stages, so both claims hold for the file.

The update of a layer is the mean of the shards' updates. Side by side along the rank their factors give just that
product: A = [A1; A2; ...], B = [B1, B2, ...] * scale / shards. A shard whose prefix does not reach a layer adds zero
to it, as it does to the mean. Heads are averaged. numpy only: the API exports without loading torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from shards.errors import ShardsError
from shards.recipe import Recipe

Tensors = Mapping[str, npt.NDArray[np.float32]]
"""By the names of a peft adapter file."""

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_LAYER = re.compile(r"\.(\w+)\.(\d+)\.")


def lora_scale(recipe: Recipe) -> float:
    """What the product of LoRA factors is multiplied with."""
    lora = recipe.lora
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def merge(lines: Sequence[Sequence[Tensors]], scale: float) -> dict[str, npt.NDArray[np.float32]]:
    """One adapter of rank (shards * rank), LoRA scale 1, from the chains of the live shards.

    Args:
        lines: per live shard, in the order of shards, the tensors of its stages, shortest prefix first.
        scale: the recipe's LoRA scale.

    Raises:
        ShardsError: no shard is live.
    """
    if not lines:
        raise ShardsError("no shard has a clean stage: there is nothing to export until one is rebuilt")
    chains = [{name: tensor for stage in line for name, tensor in stage.items() if _is_lora(name)} for line in lines]
    shapes = {name: tensor.shape for chain in chains for name, tensor in chain.items()}
    merged: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in sorted(shapes.items()):
        parts = [chain.get(name, np.zeros(shape, np.float32)) for chain in chains]
        if name.endswith(DOWN):
            merged[name] = np.concatenate(parts, axis=0)
        else:
            merged[name] = np.concatenate(parts, axis=1) * np.float32(scale / len(lines))
    for name in sorted(name for name in lines[0][-1] if not _is_lora(name)):
        total = np.zeros(lines[0][-1][name].shape, np.float64)  # one by one, in the order of the shards
        for line in lines:
            total += line[-1][name]
        merged[name] = (total / len(lines)).astype(np.float32)
    return merged


def tensors_of(artifact: bytes) -> Tensors:
    """The tensors of a stage's artefact."""
    return safetensors.numpy.load(artifact)


def adapter_bytes(merged: Tensors) -> bytes:
    """The adapter's weight file (`adapter_model.safetensors`); equal tensors give equal bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(tensor) for name, tensor in sorted(merged.items())})


def adapter_config(recipe: Recipe, merged: Tensors) -> bytes:
    """Its `adapter_config.json`, read off the tensors' names."""
    places = {match.group(1, 2) for name in merged if _is_lora(name) for match in [_LAYER.search(name)] if match}
    heads = {name.removeprefix("base_model.model.").rpartition(".")[0] for name in merged if not _is_lora(name)}
    rank = next(tensor.shape[0] for name, tensor in merged.items() if name.endswith(DOWN))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if recipe.task == "completion" else None,
        "base_model_name_or_path": recipe.pretrained.source,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
        "target_modules": list(recipe.lora.targets),
        "layers_to_transform": sorted(int(index) for _, index in places),
        "layers_pattern": min(pattern for pattern, _ in places),
        "modules_to_save": sorted(heads) or None,
    }
    return json.dumps(config, indent=2, sort_keys=True).encode()


def _is_lora(name: str) -> bool:
    return name.endswith((DOWN, UP))
