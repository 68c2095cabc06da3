"""The recipe: all that decides a model's weights besides the manifests. A JSON file in the user's Git."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from shards.digest import digest_of
from shards.errors import RecipeError
from shards.orders import cyclic

T = TypeVar("T")
Provenance = Literal["public", "own_clean", "own_contains_subjects"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """The frozen pretrained model under the adapters."""

    source: str
    """Local directory or Hugging Face hub id. Where it lies decides no weights, so it is left out of the digest."""
    digest: str
    """SHA-256 over the digests of the directory's config, tokenizer and weight files."""
    provenance: Provenance = "public"
    """Whether the backbone may have seen the subjects; `own_contains_subjects` refuses every claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters of the trained layers (peft's LoraConfig)."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("query", "value")
    """Names of the linear modules inside a layer that get an adapter."""
    dropout: float = 0.0
    rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hyper-parameters of one model; equal digests mean equal training given equal manifests."""

    backbone: Backbone
    classes: tuple[str, ...]
    """Labels in the order of the logits; declared, never gathered from data (design.md 2.4)."""
    shards: int
    slices: int
    orders: int = 1
    """Slice orders trained per shard (S3T's budget B)."""
    engine: Literal["s3t"] = "s3t"
    layers_per_slice: int = 1
    lora: Lora = field(default_factory=Lora)
    epochs: int = 3
    """Passes over a stage's records; never decided by data."""
    batch_size: int = 16
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-2
    weight_decay: float = 0.0
    backbone_dropout: bool = False
    """Whether the backbone's own dropout is on in the trained layers."""
    max_tokens: int = 64
    """Longer inputs are cut here; training pads every record to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, naming the field."""
        at_least_one = ("shards", "slices", "orders", "layers_per_slice", "epochs", "batch_size")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise RecipeError("classes must name at least two distinct labels")
        if self.max_tokens < 8:
            raise RecipeError(f"max_tokens must be at least 8, not {self.max_tokens}")
        if self.lora.rank < 1 or not self.lora.targets or not 0 <= self.lora.dropout < 1:
            raise RecipeError("lora needs a rank of at least 1, targets, and a dropout in [0, 1)")
        if min(self.learning_rate, self.head_learning_rate) <= 0 or self.weight_decay < 0:
            raise RecipeError("learning rates must be positive and weight_decay not negative")
        cyclic(self.slices, self.orders)

    @property
    def slice_orders(self) -> tuple[tuple[int, ...], ...]:
        """The recipe's own orders; `canonical` assemblies are built from these alone."""
        return cyclic(self.slices, self.orders)

    @property
    def digest(self) -> str:
        """Digest of every field that decides weights."""
        body = self.to_json()
        del body["backbone"]["source"]
        return digest_of(body)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, tuples as lists."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read a recipe.

        Raises:
            RecipeError: an unknown, missing or ill-typed field, by name.
        """
        return _read(cls, body, "recipe")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _read(cls: type[T], body: Any, where: str) -> T:
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where} must be an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(body) - set(hints)):
        raise RecipeError(f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(hints))}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in body.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast("type[Any]", hint), value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f"{where} must be a list of strings")
        return tuple(value)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value
