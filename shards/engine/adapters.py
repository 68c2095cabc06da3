"""The adapters of every block and the head, placed once by peft and addressed by integer layer index."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from shards.digest import sha256_hex
from shards.engine.artifacts import Artifact
from shards.engine.backbone import Backbone
from shards.engine.structure import targets
from shards.errors import RecipeError, ShardsError
from shards.recipe import Recipe

FrozenState = tuple[dict[str, str], list[int]]
"""Digests of the frozen adapters, and how often each base weight was written (torch counts)."""


class Adapters:
    """A replica of the backbone with LoRA in its top layers; tensors go by the names of peft's adapter files."""

    def __init__(self, backbone: Backbone, recipe: Recipe, floor: int) -> None:
        """Place adapters in layers `floor` and above.

        Raises:
            RecipeError: the recipe's LoRA targets are not in the backbone.
        """
        self._backbone = backbone
        self._floor = floor
        self.model = self._place(recipe)
        self.head: dict[str, nn.Parameter] = {}
        self._lora: dict[str, nn.Parameter] = {}
        self._layer: dict[str, int] = {}
        self._base: list[nn.Parameter] = []
        for name, parameter in sorted(self.model.named_parameters()):
            self._file(name, parameter)

    def block(self, start: int, stop: int) -> dict[str, nn.Parameter]:
        """Adapters of the layers start..stop-1. By integer: "layer.1" is also how "layer.10" begins."""
        return {name: tensor for name, tensor in self._lora.items() if start <= self._layer[name] < stop}

    @torch.no_grad()
    def restore(self, parents: Sequence[Artifact], seed: int) -> None:
        """Put the parents' blocks and the last one's head in place; without parents, the seed's head."""
        for parent in parents:
            for name, tensor in parent.lora.items():
                self._lora[name].copy_(tensor)
        if not parents:
            self._start_head(seed)
            return
        for name, tensor in parents[-1].head.items():
            self.head[name].copy_(tensor)

    @torch.no_grad()
    def initialise(self, block: Mapping[str, nn.Parameter], seed: int) -> None:
        """The start that peft gives (A Kaiming-uniform, B zero), drawn from the seed, not the global stream."""
        generator = torch.Generator().manual_seed(seed + 1)  # + 1: not the numbers that the head began with
        for name, tensor in block.items():
            if ".lora_A." in name:
                limit = 1.0 / math.sqrt(tensor.shape[1])
                tensor.copy_(torch.empty(tensor.shape).uniform_(-limit, limit, generator=generator))
            else:
                tensor.zero_()

    @torch.no_grad()
    def clear(self) -> None:
        """Leave nothing of what was trained here in memory."""
        for parameter in (*self._lora.values(), *self.head.values()):
            parameter.zero_()
            parameter.grad = None

    def unfreeze(self, block: Mapping[str, nn.Parameter], *, backbone_dropout: bool) -> None:
        """Let the block alone (and the head) be trained; adapters' dropout on, the backbone's where asked
        for.
        """
        for name, parameter in self._lora.items():
            parameter.requires_grad_(name in block)
        self.model.train(backbone_dropout)
        for name, module in self.model.named_modules():
            if ".lora_dropout." in name:
                module.train()

    def frozen(self, block: Mapping[str, nn.Parameter]) -> FrozenState:
        """The state of all that training the block must leave as it is."""
        others = {name: tensor for name, tensor in self._lora.items() if name not in block}
        return _digests(others), [parameter._version for parameter in self._base]  # noqa: SLF001

    def _place(self, recipe: Recipe) -> Any:
        backbone, lora = self._backbone, recipe.lora
        model = backbone.replica()
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=list(targets(model, backbone.layers, recipe, self._floor)),
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            modules_to_save=list(backbone.heads) or None,
        )
        # torch's fused attention is four times slower than this on CPU, backwards in bf16.
        model.set_attn_implementation("eager")
        try:
            with warnings.catch_warnings():  # peft asks for a property that transformers has renamed
                warnings.simplefilter("ignore", FutureWarning)
                warnings.filterwarnings("ignore", "fan_in_fan_out")  # it sees a Conv1D and says so
                return get_peft_model(model, config).base_model.model
        except ValueError as error:
            raise RecipeError(f"lora.targets {list(lora.targets)} do not fit the backbone: {error}") from error

    def _file(self, name: str, parameter: nn.Parameter) -> None:
        """Sort a parameter into adapters, head or base."""
        exported = "base_model.model." + name.replace(".default.", ".").replace(".modules_to_save.", ".")
        if ".lora_A." in name or ".lora_B." in name:
            layer = self._backbone.layer_index(name)
            if layer is None or layer < self._floor:
                raise ShardsError(f"adapter {name} was placed outside the trained layers; report this")
            self._lora[exported], self._layer[exported] = parameter, layer
        elif ".modules_to_save." in name:
            self.head[exported] = parameter
        else:
            parameter.requires_grad_(False)  # noqa: FBT003 - the stubs know no name for it
            self._base.append(parameter)

    def _start_head(self, seed: int) -> None:
        """Matrices normal with the model's own spread, norms one, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        spread = float(getattr(self.model.config, "initializer_range", 0.02))
        for name, tensor in self.head.items():
            if tensor.dim() > 1:
                tensor.copy_(torch.empty(tensor.shape).normal_(0.0, spread, generator=generator))
            else:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: sha256_hex(tensor.detach().cpu().numpy().tobytes()) for name, tensor in tensors.items()}
