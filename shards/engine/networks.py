"""What engine `sisa` trains whole: a module of the user's own, or a pretrained model with a new head."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shards.engine.backbone import Backbone
from shards.engine.inputs import Codec
from shards.engine.linears import pin
from shards.engine.memory import is_shortage
from shards.engine.modules import build
from shards.engine.vectors import Vectors
from shards.engine.window import Batch
from shards.errors import ModuleError, RecipeError
from shards.recipe import Recipe

Tensors = Mapping[str, Tensor]
MOST = 32
"""Rows per pass of a pretrained model in serving; beyond it activations leave the cache."""
FILLED = 16
"""Rows of every pass of an own module in serving: with one row count there is one kernel (facts/training.md 1, B)."""


class Network(Protocol):
    """A kind of model that is trained whole."""

    codec: Codec
    sizes: tuple[int, ...]
    """Rows of a pass in serving, largest first; what does not fill the smallest is filled up."""

    def begin(self, seed: int) -> nn.Module:
        """A module of its own memory, as training begins."""
        ...

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """What the optimizer gets."""
        ...

    def train(self, module: nn.Module) -> None:
        """Set the module's mode for training."""
        ...

    def base(self) -> nn.Module:
        """A module in serving mode, into which `functional_call` puts tensors of the types and places of its own."""
        ...

    def call(self, module: nn.Module, batch: Batch, tensors: Tensors | None = None) -> Tensor:
        """Logits (rows, outputs), float32; with `tensors` in place of the module's own where given."""
        ...


class Own:
    """A `torch.nn.Module` on rows of numbers."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        """Import the class, build it once and run it on rows that are made up.

        Raises:
            ModuleError: it cannot be imported or built, is not the recipe's, or its rows or outputs have other widths.
        """
        if recipe.module is None:
            raise RecipeError("module is missing: name the class that engine sisa trains")
        self._recipe = recipe
        self._module = recipe.module
        self._device = torch.device(device)
        self.codec: Codec = Vectors(recipe.module.width, self._device)
        self.sizes: tuple[int, ...] = (FILLED,)
        with torch.inference_mode():
            width = recipe.module.width
            self.call(self.base(), self.codec.collate(self.codec.made_up(FILLED, width), width))

    def begin(self, seed: int) -> nn.Module:
        """The module as its constructor makes it from the seed."""
        return build(self._module, seed).to(self._device)

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """All trainable parameters, at one rate."""
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return [{"params": parameters, "lr": self._recipe.learning_rate}]

    def train(self, module: nn.Module) -> None:
        """Its dropout is its own business: on."""
        module.train()

    def base(self) -> nn.Module:
        """The module as any seed makes it."""
        return self.begin(0).eval().requires_grad_(requires_grad=False)

    def call(self, module: nn.Module, batch: Batch, tensors: Tensors | None = None) -> Tensor:
        """Logits.

        Raises:
            ModuleError: the module fails, or its output has another width than the recipe.
        """
        rows = batch.inputs["vector"]
        try:
            with _autocast(self._recipe, self._device):
                found = module(rows) if tensors is None else torch.func.functional_call(module, dict(tensors), (rows,))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            if is_shortage(error):
                raise
            # Its message may hold what it was given.
            problem = f"{self._module.path} fails on rows of shape {tuple(rows.shape)}: {type(error).__name__}"
            raise ModuleError(f"{problem}; try the class on such rows by hand") from None
        wanted = (rows.shape[0], self._recipe.outputs)
        if not isinstance(found, Tensor) or found.shape != wanted:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ModuleError(f"{self._module.path} gives {shape} where the recipe needs a tensor of shape {wanted}")
        return found.float()


class Pretrained:
    """A Hugging Face model, every parameter trained, with a new head."""

    def __init__(self, recipe: Recipe, backbone: Backbone | None = None, device: str = "cpu") -> None:
        """Load the backbone in full precision unless it is given so.

        Raises:
            BackboneError: see `Backbone.load`.
        """
        self._recipe = recipe
        # The grid's fields are about blocks of layers, which nothing is cut into here.
        whole = dataclasses.replace(recipe, slices=1, layers_per_slice=1, trunk_layers=None, prior=())
        whole = dataclasses.replace(whole, precision="float32")
        if backbone is None or backbone.precision is not torch.float32:  # weights that are trained are never rounded
            backbone = Backbone.load(whole, device)
        self.backbone = backbone
        self.codec: Codec = self.backbone.codec
        self.sizes: tuple[int, ...] = tuple(2**power for power in range(int(math.log2(MOST)), -1, -1))

    def begin(self, seed: int) -> nn.Module:
        """The pretrained weights, and a head drawn from the seed: matrices normal, norms one, biases zero."""
        module = copy.deepcopy(self.backbone.model)
        # torch's fused attention is four times slower backwards on CPU in bf16.
        module.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        generator = torch.Generator().manual_seed(seed)
        spread = float(getattr(module.config, "initializer_range", 0.02))
        with torch.no_grad():
            for name, tensor in module.named_parameters():
                if not self._is_head(name):
                    continue
                if tensor.dim() > 1:
                    tensor.copy_(torch.empty(tensor.shape).normal_(0.0, spread, generator=generator))
                else:
                    tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        return module.requires_grad_(requires_grad=True)

    def groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """The pretrained parameters at `learning_rate`, the head at its own."""
        named = list(module.named_parameters())
        return [
            {"params": [p for name, p in named if not self._is_head(name)], "lr": self._recipe.learning_rate},
            {"params": [p for name, p in named if self._is_head(name)], "lr": self._recipe.head_learning_rate},
        ]

    def train(self, module: nn.Module) -> None:
        """Dropout as the recipe says."""
        module.train(self._recipe.backbone_dropout)

    def base(self) -> nn.Module:
        """A replica whose layers give a sequence the same bits among any number of others.

        Matrices are rounded to the autocast precision here, once, instead of at each call; the bits are the same.
        """
        if self._recipe.precision == "float32":
            return self.backbone.pure_replica(self.codec.lengths, MOST)
        model = copy.deepcopy(self.backbone.model)
        pin(model, self.backbone.layers, torch.bfloat16)
        rounded = dataclasses.replace(self.backbone, model=model, precision=torch.bfloat16)
        return rounded.pure_replica(self.codec.lengths, MOST)

    def call(self, module: nn.Module, batch: Batch, tensors: Tensors | None = None) -> Tensor:
        """Logits."""
        inputs = dict(batch.inputs)
        with _autocast(self._recipe, self.backbone.device):
            if tensors is None:
                return module(**inputs).logits.float()
            return torch.func.functional_call(module, dict(tensors), (), inputs).logits.float()

    def _is_head(self, name: str) -> bool:
        return name.startswith(tuple(head + "." for head in self.backbone.heads))


def network_of(recipe: Recipe, backbone: Backbone | None = None, device: str = "cpu") -> Network:
    """The network that the recipe names.

    Raises:
        ModuleError: see `Own`.
        BackboneError: see `Backbone.load`.
    """
    return Own(recipe, device) if recipe.module is not None else Pretrained(recipe, backbone, device)


def _autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16")
