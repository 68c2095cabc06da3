"""The recipe: all that decides a model's weights besides the manifests. A JSON file in the user's Git."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Self

from shards.digest import digest_of
from shards.errors import RecipeError
from shards.orders import orders_for
from shards.recipe_json import plain, read

Provenance = Literal["public", "own_clean", "own_contains_subjects"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """The pretrained model under the trained parts."""

    source: str
    """Local directory or Hugging Face hub id. Where it lies decides no weights, so it is left out of the digest."""
    digest: str
    """SHA-256 over the digests of the directory's config, tokenizer and weight files."""
    provenance: Provenance = "public"
    """Whether the backbone may have seen the subjects; `own_contains_subjects` refuses every claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A `torch.nn.Module` that engine `sisa` trains whole."""

    path: str
    """`package.module:Class`, importable where stages are trained and served."""
    digest: str
    """SHA-256 of the source file that defines the class (`shards.engine.modules.source_digest`)."""
    width: int
    """How many numbers a row of its input has."""
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keyword arguments of the constructor."""


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
class Ridge:
    """The closed-form head of engine `ridge`."""

    layers: int = 4
    """How many of the backbone's last layers give a mean pool; the features are these, one after the other."""
    bits: int = 8
    """Features lie on the grid of 2^-bits."""
    clip: float = 16.0
    """Features are cut to [-clip, clip]; declared, so that the sums' bound is known before any data is."""
    penalty: float = 30.0
    """Lambda, added to the diagonal once, at the solve, in units of squared features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Declared scale of a regression's target: the model learns (y - offset) / spread."""

    offset: float = 0.0
    spread: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorClass:
    """Subjects of like deletion prior; they share slices. Classes take consecutive slices in the order listed."""

    name: str
    rate: float
    """Deletions per record and year, or in any other unit that all classes share; declared, never counted."""
    slices: int
    expires: bool = False
    """Subjects with a known date of deletion: their slices go last in every order."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of one model; equal digests mean equal training given equal manifests.

    Fields that came later decide nothing while they have their default, and are then left out of the digest.
    """

    shards: int
    slices: int
    backbone: Backbone | None = None
    classes: tuple[str, ...] = ()
    """Labels in the order of the logits; declared, never gathered from data (design.md 2.4)."""
    orders: int = 1
    """Slice orders trained per shard (S3T's budget B)."""
    engine: Literal["s3t", "sisa", "ridge", "external"] = "s3t"
    layers_per_slice: int = 1
    lora: Lora = field(default_factory=Lora)
    epochs: int = 3
    """Passes over a stage's records; never decided by data. Engine `sisa` spreads them over its stages."""
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
    task: Literal["classification", "regression", "completion"] = "classification"
    """`completion`: a causal language model learns the label as the answer to the text."""
    input: Literal["text", "image", "vector"] = "text"
    """`vector`: the text is a JSON array of numbers, for modules that take a row of floats."""
    aggregation: Literal["logits", "merged"] = "logits"
    """`merged`: one adapter, the shards' LoRA factors side by side along the rank, answers for all."""
    scale: Scale | None = None
    module: Module | None = None
    ridge: Ridge | None = None
    command: str | None = None
    """Engine `external`: the name of a training command that the operator allows (`EXPUNGE_COMMANDS`)."""
    prior: tuple[PriorClass, ...] = ()
    trunk_layers: int | None = None
    """Layers that are never trained; where given, slices * layers_per_slice must be all the others."""
    device: str | None = None
    """Where stages must be trained and served; None leaves it to each process's setting."""
    tuned_on: Literal["non_deletable", "deletable"] = "non_deletable"
    """What these hyper-parameters were chosen on. `deletable` is refused: the choice would outlive a deletion."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, naming the field."""
        self._check_numbers()
        self._check_task()
        self._check_engine()
        self._check_prior()
        _ = self.slice_orders

    @cached_property
    def slice_orders(self) -> tuple[tuple[int, ...], ...]:
        """The recipe's own orders; `canonical` assemblies are built from these alone.

        The stages of engine `ridge` are single cells: one order of one slice for each.
        """
        if self.engine == "ridge":
            return tuple((index,) for index in range(self.slices))
        rates = tuple(each.rate for each in self.prior for _ in range(each.slices))
        expiring = [each.expires for each in self.prior for _ in range(each.slices)]
        last = frozenset(index for index, expires in enumerate(expiring) if expires)
        return orders_for(self.slices, self.orders, rates, last)

    @property
    def seats(self) -> int:
        """Members of an assembly: one per shard; of engine `ridge`, one per cell."""
        return self.shards * self.slices if self.engine == "ridge" else self.shards

    def seat(self, shard: int, prefix: tuple[int, ...]) -> int:
        """Which member of an assembly a stage can be."""
        return shard * self.slices + prefix[0] if self.engine == "ridge" else shard

    @property
    def rule(self) -> str:
        """The aggregation rule of its assemblies: `logits`, `merged` or, of engine `ridge`, `sums`."""
        return "sums" if self.engine == "ridge" else self.aggregation

    @property
    def outputs(self) -> int:
        """Width of the head: classes, or 1 for a regression."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def pretrained(self) -> Backbone:
        """The backbone.

        Raises:
            RecipeError: the recipe has none.
        """
        if self.backbone is None:
            raise RecipeError("recipe.backbone is missing: name the directory and the digest of a pretrained model")
        return self.backbone

    @cached_property
    def digest(self) -> str:
        """Digest of every field that decides weights."""
        body = self.to_json()
        if self.backbone is not None:
            del body["backbone"]["source"]
        return digest_of(body)

    def to_json(self) -> dict[str, Any]:
        """The recipe as JSON, tuples as lists, later fields only where they say something."""
        body = plain(dataclasses.asdict(self))
        return {name: value for name, value in body.items() if name in _FIRST or value != _LATER[name]}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Self:
        """Read a recipe.

        Raises:
            RecipeError: an unknown, missing or ill-typed field, by name.
        """
        found = read(cls, body, "recipe")
        try:
            _ = found.digest
        except ValueError as error:
            raise RecipeError(
                f"recipe has no digest ({error}): use whole numbers below 2^53, finite numbers, and text of Unicode"
            ) from None
        return found

    def _check_numbers(self) -> None:
        at_least_one = ("shards", "slices", "orders", "layers_per_slice", "epochs", "batch_size")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens < 8:
            raise RecipeError(f"max_tokens must be at least 8, not {self.max_tokens}")
        if min(self.lora.rank, self.lora.alpha) < 1 or not self.lora.targets or not 0 <= self.lora.dropout < 1:
            raise RecipeError("lora needs a rank and an alpha of at least 1, targets, and a dropout in [0, 1)")
        rates = (self.learning_rate, self.head_learning_rate, self.weight_decay)
        if not all(map(math.isfinite, rates)) or min(rates[:2]) <= 0 or rates[2] < 0:
            raise RecipeError("learning rates must be positive and weight_decay not negative")
        if self.tuned_on == "deletable":
            raise RecipeError(
                "tuned_on: hyper-parameters chosen on deletable records carry their influence past a deletion; choose "
                "them on public or non-deletable data and declare non_deletable"
            )

    def _check_task(self) -> None:
        if self.task == "classification":
            if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
                raise RecipeError("classes must name at least two distinct labels")
        elif self.classes:
            raise RecipeError(f"classes: a {self.task} has none; leave the field out")
        if self.scale is not None:
            if self.task != "regression":
                raise RecipeError("scale is a regression's: leave it out, or set task to regression")
            if not (math.isfinite(self.scale.offset) and math.isfinite(self.scale.spread) and self.scale.spread > 0):
                raise RecipeError("scale needs a finite offset and a positive spread")
        if self.task == "completion" and (self.input != "text" or self.engine not in {"s3t", "external"}):
            raise RecipeError("task: completion is trained on text by engine s3t; change input or engine")
        if self.aggregation == "merged" and self.engine != "s3t":
            raise RecipeError("aggregation: merged is engine s3t's, whose adapters it joins; use logits")

    def _check_engine(self) -> None:
        own = {"sisa": "module", "ridge": "ridge", "external": "command"}
        for engine, name in own.items():
            if getattr(self, name) is not None and self.engine != engine:
                raise RecipeError(f"{name} is engine {engine}'s: leave it out, or set engine to {engine}")
        if self.engine == "external" and not self.command:
            raise RecipeError("command: engine external needs the name of an allowed training command")
        if (self.backbone is None) == (self.module is None) and self.engine != "external":
            raise RecipeError("backbone: give the pretrained model to train on (for engine sisa, or a module)")
        if self.module is not None and self.module.width < 1:
            raise RecipeError(f"module.width must be at least 1, not {self.module.width}")
        if (self.input == "vector") != (self.module is not None) and self.engine != "external":
            raise RecipeError("input: vector goes with a module of your own, text and image with a backbone")
        if self.trunk_layers is not None and self.engine in {"sisa", "ridge"}:
            raise RecipeError(f"trunk_layers: engine {self.engine} cuts no layers into blocks; leave it out")
        if self.engine != "s3t" and self.orders != 1:
            raise RecipeError(f"orders: engine {self.engine} has one; several are engine s3t's")
        if (ridge := self.ridge) is not None and not (
            ridge.layers >= 1 and 0 <= ridge.bits <= 20 and 0 < ridge.clip <= 2**10 and 0 < ridge.penalty < math.inf
        ):
            raise RecipeError(
                "ridge needs layers of at least 1, bits in [0, 20], a clip in (0, 1024], and a positive penalty"
            )

    def _check_prior(self) -> None:
        if not self.prior:
            return
        if len({each.name for each in self.prior}) != len(self.prior):
            raise RecipeError("prior: two classes have the same name")
        if any(each.slices < 1 for each in self.prior) or sum(each.slices for each in self.prior) != self.slices:
            raise RecipeError(f"prior: the classes' slices must be at least 1 each and add up to {self.slices}")


_LATER: dict[str, Any] = {
    each.name: plain(each.default)
    for each in dataclasses.fields(Recipe)
    if each.name
    in {
        "task",
        "input",
        "aggregation",
        "scale",
        "module",
        "ridge",
        "command",
        "prior",
        "trunk_layers",
        "device",
        "tuned_on",
    }
}
"""Fields that came after the first recipes, with their defaults."""
_FIRST = frozenset(each.name for each in dataclasses.fields(Recipe)) - _LATER.keys()
