"""Which engine a recipe names: its trainer and its reader."""

from collections.abc import Mapping, Sequence
from typing import Any

from shards.engine.interface import Reader, Trainer
from shards.errors import RecipeError
from shards.recipe import Recipe


def open_trainer(recipe: Recipe, device: str = "cpu", commands: Mapping[str, Sequence[str]] | None = None) -> Trainer:
    """The trainer of a recipe, its backbone loaded: may take seconds.

    Args:
        recipe: what to train.
        device: torch device of this process.
        commands: training commands that the operator allows, by name; engine `external` runs no other.

    Raises:
        ModuleError: the module of engine `sisa` cannot be used.
        CommandError: the command of engine `external` is not allowed.
        RecipeError: the recipe names another device, or does not fit the backbone.
        BackboneError: the backbone is not there, or is not the one that the recipe names.
    """
    _check_device(recipe, device)
    match recipe.engine:
        case "s3t":
            from shards.engine.s3t import S3T  # noqa: PLC0415 - only the engine in use is loaded

            return S3T(recipe, device=device)
        case "sisa":
            from shards.engine.sisa import Sisa  # noqa: PLC0415

            return Sisa(recipe, device=device)
        case "ridge":
            from shards.engine.ridge import RidgeTrainer  # noqa: PLC0415

            return RidgeTrainer(recipe, device=device)
        case "external":
            from shards.engine.external import External  # noqa: PLC0415

            return External(recipe, commands)


def open_reader(recipe: Recipe, device: str = "cpu", trainer: Any = None) -> Reader:
    """The reader of a recipe; over the backbone of `trainer` where one is given.

    Raises:
        RecipeError: the engine's models are not served here, or the recipe names another device.
        BackboneError: the backbone is not there, or is not the one that the recipe names.
    """
    _check_device(recipe, device)
    backbone = getattr(trainer, "backbone", None)
    match recipe.engine:
        case "s3t":
            from shards.engine.stacked import StackedReader  # noqa: PLC0415

            return StackedReader(recipe, backbone, device=device)
        case "sisa":
            from shards.engine.sisa_reader import SisaReader  # noqa: PLC0415

            return SisaReader(recipe, backbone, device=device)
        case "ridge":
            from shards.engine.ridge_reader import RidgeReader  # noqa: PLC0415

            return RidgeReader(recipe, backbone, device=device)
        case "external":
            raise RecipeError(
                "engine external trains with a command of yours; serve its artefacts with a server of yours"
            )


def _check_device(recipe: Recipe, device: str) -> None:
    if recipe.device is not None and recipe.device != device:
        raise RecipeError(
            f"device: the recipe's stages belong on {recipe.device}, this process computes on {device}: "
            "set EXPUNGE_DEVICE for it, or leave recipe.device out"
        )
