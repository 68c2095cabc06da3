"""Where a backbone keeps its layers and heads, found by structure so that no architecture needs code of its own."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from shards.errors import BackboneError, RecipeError
from shards.recipe import Recipe

LAYERS: dict[str, str] = {
    "jamba": "model.layers",  # attention and state space layers by turns: one list, two kinds of element
}
"""Path of the layer list by the config's `model_type`, for models in which structure alone does not decide."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def layer_list(model: Any) -> tuple[str, int]:
    """Path and length of the list of transformer layers: the only one of the config's length with one kind of element.

    Raises:
        BackboneError: none or several; the message names what was found.
    """
    if (path := LAYERS.get(model.config.model_type)) is not None:
        return path, len(model.get_submodule(path))
    depths = {getattr(part, name) for part in _configs(model.config) for name in _DEPTHS if hasattr(part, name)}
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [name for name, each in lists.items() if len(each) in depths and len({type(layer) for layer in each}) == 1]
    found = [name for name in found if not any(name.startswith(other + ".") for other in found if other != name)]
    if len(found) != 1:
        shown = ", ".join(f"{name} ({len(each)})" for name, each in lists.items()) or "none"
        raise BackboneError(
            f"expected one list of {sorted(depths)} like layers in {type(model).__name__}, found {found or 'none'} "
            f"among its module lists: {shown}; name the right one for model_type {model.config.model_type!r} in "
            "shards/engine/structure.py LAYERS, or take a backbone whose layers are one list"
        )
    return found[0], len(lists[found[0]])


def check_blocks(recipe: Recipe, depth: int) -> None:
    """Refuse blocks that do not fit the layers.

    Raises:
        BackboneError: more layers are asked for than there are.
        RecipeError: `trunk_layers` is not what the blocks leave.
    """
    trained = recipe.slices * recipe.layers_per_slice
    if trained > depth:
        raise BackboneError(
            f"{recipe.slices} slices of {recipe.layers_per_slice} layers need more than the backbone's "
            f"{depth} layers: lower slices or layers_per_slice"
        )
    if recipe.trunk_layers is not None and recipe.trunk_layers != depth - trained:
        raise RecipeError(
            f"trunk_layers is {recipe.trunk_layers}, but of {depth} layers {recipe.slices} slices of "
            f"{recipe.layers_per_slice} leave {depth - trained}: say {depth - trained}, leave it out, or change slices "
            "or layers_per_slice"
        )


def heads(model: Any, missing: set[str], layers: str) -> tuple[str, ...]:
    """Trained modules: those beside the base model, and a pooler in it that the weight files do not hold.

    Raises:
        BackboneError: the files lack other weights, or there is no head.
    """
    base = model.base_model_prefix
    beside = {name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())}
    inside = {name for name in missing if name.startswith(base + ".")}
    check_missing({name for name in inside if "pool" not in name or name.startswith(layers + ".")})
    if not beside:
        raise BackboneError(f"{type(model).__name__} has no head beside {base!r}")
    return tuple(sorted(beside | {".".join(name.split(".")[:2]) for name in inside}))


def check_missing(missing: set[str]) -> None:
    """Refuse pretrained weights with holes.

    Raises:
        BackboneError: a weight is missing.
    """
    if missing:
        raise BackboneError(f"the backbone's weight files lack {min(missing)}; save the whole model again")


def linears(model: nn.Module, layers: str) -> Iterator[tuple[str, int, nn.Module]]:
    """Path, layer index and module of every linear module in the layers."""
    for name, module in model.named_modules():
        if name.startswith(layers + ".") and isinstance(module, nn.Linear | Conv1D):
            yield name, int(name.removeprefix(layers + ".").split(".", 1)[0]), module


def targets(model: nn.Module, layers: str, recipe: Recipe, floor: int) -> dict[str, tuple[int, int]]:
    """Paths of the modules that get an adapter, with their widths (in, out): those in layers `floor` and above.

    Raises:
        RecipeError: a target is in none of them; the message names the linear modules that are.
    """
    found: dict[str, tuple[int, int]] = {}
    unused = set(recipe.lora.targets)
    names: set[str] = set()
    for name, index, module in linears(model, layers):
        names.add(name.split(".", layers.count(".") + 2)[-1])
        hit = {target for target in recipe.lora.targets if name.endswith("." + target)}
        unused -= hit
        if hit and index >= floor:
            weight = module.get_parameter("weight")
            turned = weight if isinstance(module, nn.Linear) else weight.t()  # Conv1D keeps (in, out)
            found[name] = (turned.shape[1], turned.shape[0])
    if unused:
        raise RecipeError(
            f"lora.targets: {sorted(unused)} are no linear modules of the backbone's layers; there are {sorted(names)}"
        )
    return found


def _configs(config: Any) -> list[Any]:
    """The config and those inside it, of text and vision parts."""
    inner = [part for part in vars(config).values() if hasattr(part, "model_type")]
    return [config, *inner]
