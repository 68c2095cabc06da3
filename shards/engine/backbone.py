"""The frozen backbone: found, checked against the recipe's digest, loaded once per process and shared by
every use.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shards.engine.files import backbone_digest, locate
from shards.engine.linears import SequenceLinear, depends_on_rows, exchange, pin
from shards.engine.window import Tokens
from shards.errors import BackboneError
from shards.recipe import Recipe


@dataclass(frozen=True)
class Backbone:
    """A classifier on the backbone: weights shared by all replicas, head not yet trained."""

    model: nn.Module = field(repr=False)
    tokenizer: Any = field(repr=False)
    layers: str
    """Path of the list of transformer layers."""
    depth: int
    """Number of layers D."""
    heads: tuple[str, ...]
    """Paths of the modules that are trained beside the adapters (`classifier`, `score`, ...)."""
    as_tuple: bool
    """Whether a layer returns a tuple."""
    max_tokens: int
    precision: torch.dtype
    device: torch.device

    @classmethod
    def load(cls, recipe: Recipe, device: str = "cpu") -> "Backbone":
        """Load the recipe's backbone, refusing any other.

        Raises:
            BackboneError: absent, of another digest, incomplete, or with too few layers for the recipe's
                slices.
        """
        directory = locate(recipe.backbone.source)
        if (found := backbone_digest(directory)) != recipe.backbone.digest:
            raise BackboneError(
                f"the backbone in {directory} has digest {found[:12]}, the recipe names "
                f"{recipe.backbone.digest[:12]}: put the recipe's files there, or train anew on "
                "these under a new recipe"
            )
        model, missing = _read(directory, len(recipe.classes))
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        _set_padding(model, tokenizer)
        layers, depth = _layer_list(model)
        if recipe.slices * recipe.layers_per_slice > depth:
            raise BackboneError(
                f"{recipe.slices} slices of {recipe.layers_per_slice} layers need more than the backbone's "
                f"{depth} layers: lower slices or layers_per_slice"
            )
        heads = _heads(model, missing, layers)
        precision = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        pin(model, layers, precision)
        model.to(device).eval().requires_grad_(requires_grad=False)
        as_tuple = _returns_tuple(model, layers, torch.device(device))
        return cls(
            model,
            tokenizer,
            layers,
            depth,
            heads,
            as_tuple,
            recipe.max_tokens,
            precision,
            torch.device(device),
        )

    def replica(self) -> Any:
        """A module tree of its own over the same weight memory: replace modules in it at will, never write
        weights.
        """
        shared = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in shared})

    def pure_replica(self, lengths: Sequence[int], rows: int) -> Any:
        """A replica whose layers give a sequence the same bits among 1 to `rows` sequences of one of the
        `lengths`.

        oneDNN's bf16 products with a long inner dimension split their sum by the number of rows (seen on AMX:
        1536 to 384 differs below 512 rows); matrices of such shapes are multiplied one sequence at a time.
        What this cannot mend is found by the probes of trunk and skeleton.
        """
        model = self.replica()
        fickle: dict[tuple[int, int], bool] = {}
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and self.layer_index(name) is not None:
                shape = (module.out_features, module.in_features)
                if shape not in fickle:
                    fickle[shape] = any(depends_on_rows(module, length, rows) for length in lengths)
                if fickle[shape]:
                    exchange(model, name, module, SequenceLinear)
        return model

    def autocast(self) -> torch.autocast:
        """The recipe's precision as a context."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision is torch.bfloat16)

    def layer_index(self, name: str) -> int | None:
        """Index of the layer that a parameter or module name lies in, parsed as an integer; None outside the
        list.
        """
        rest = name.removeprefix(self.layers + ".")
        return None if rest == name else int(rest.split(".", 1)[0])

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to `max_tokens`; a function of each text alone."""
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]

    def pad(self, ids: Sequence[Sequence[int]], length: int) -> Tokens:
        """Token ids as tensors, filled up on the right to exactly `length`."""
        filler = self.tokenizer.pad_token_id
        rows = [[*row, *[filler] * (length - len(row))] for row in ids]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in ids]
        return Tokens(torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device))


def _read(directory: Path, classes: int) -> tuple[nn.Module, set[str]]:
    transformers.logging.disable_progress_bar()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a table of "newly initialised" weights: the head, as meant
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=classes,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(f"{directory} cannot be loaded as a sequence classifier: {error}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.config.use_cache = False
    return model, set(info["missing_keys"])


def _set_padding(model: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise BackboneError("the backbone's tokenizer has neither a padding nor an end token; add one to its files")
    model.config.pad_token_id = tokenizer.pad_token_id


def _layer_list(model: Any) -> tuple[str, int]:
    config = model.config
    depth = next(
        (getattr(config, name) for name in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(config, name)),
        0,
    )
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(layer) for layer in module}) == 1
    ]
    if len(found) != 1:
        raise BackboneError(
            f"expected one list of {depth} like layers in {type(model).__name__}, found {found or 'none'}"
        )
    return found[0], depth


def _heads(model: Any, missing: set[str], layers: str) -> tuple[str, ...]:
    """Trained modules: those beside the base model, and those in it that the weight files do not hold (a new
    pooler).
    """
    base = model.base_model_prefix
    beside = {name for name, child in model.named_children() if name != base and any(True for _ in child.parameters())}
    inside = {".".join(name.split(".")[:2]) for name in missing if name.startswith(base + ".")}
    lost = sorted(name for name in missing if name.startswith((layers + ".", f"{base}.embeddings.")))
    if lost:
        raise BackboneError(f"the backbone's weight files lack {lost[0]}; save the whole model again")
    if not beside:
        raise BackboneError(f"{type(model).__name__} has no head beside {base!r}")
    return tuple(sorted(beside | inside))


def _returns_tuple(model: Any, layers: str, device: torch.device) -> bool:
    kinds: list[type] = []
    hook = model.get_submodule(layers)[0].register_forward_hook(lambda _m, _a, output: kinds.append(type(output)))
    ids = torch.full((1, 8), model.config.pad_token_id, device=device)
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    hook.remove()
    return issubclass(kinds[0], tuple)
