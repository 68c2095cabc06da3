"""The frozen backbone: found, checked against the recipe's digest, loaded once per process and shared by
every use.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

from shards.engine.files import backbone_digest, locate
from shards.engine.inputs import Codec, Encoded, Images, Texts
from shards.engine.interface import Input, inputs_of
from shards.engine.linears import SequenceLinear, depends_on_rows, exchange, pin
from shards.engine.memory import is_shortage
from shards.engine.prompts import Prompts
from shards.engine.structure import check_blocks, check_missing, heads, layer_list
from shards.engine.window import Batch
from shards.errors import BackboneError
from shards.manifest import Record
from shards.recipe import Recipe


@dataclass(frozen=True)
class Backbone:
    """A model on the backbone: weights shared by all replicas, head not yet trained."""

    model: nn.Module = field(repr=False)
    codec: Codec = field(repr=False)
    """How inputs become rows."""
    layers: str
    """Path of the list of transformer layers."""
    depth: int
    """Number of layers D."""
    heads: tuple[str, ...]
    """Paths of the modules that are trained beside the adapters (`classifier`, `score`, ...); none for completion."""
    as_tuple: bool
    """Whether a layer returns a tuple."""
    outputs: int
    """Logits per answer: classes, 1, or the vocabulary."""
    precision: torch.dtype
    device: torch.device

    @classmethod
    def load(cls, recipe: Recipe, device: str = "cpu") -> "Backbone":
        """Load the recipe's backbone, refusing any other.

        Raises:
            BackboneError: absent, of another digest, incomplete, of an unknown structure, or with too few layers for
                the recipe's slices.
            RecipeError: the recipe's blocks or limits do not fit it.
        """
        directory = locate(recipe.pretrained.source)
        if (found := backbone_digest(directory)) != recipe.pretrained.digest:
            raise BackboneError(
                f"the backbone in {directory} has digest {found[:12]}, the recipe names "
                f"{recipe.pretrained.digest[:12]}: put the recipe's files there, or train anew on "
                "these under a new recipe"
            )
        model, missing = _read(directory, recipe)
        codec = _codec(directory, recipe, model, torch.device(device))
        layers, depth = layer_list(model)
        check_blocks(recipe, depth)
        if recipe.task == "completion":
            check_missing(missing)
            own, outputs = (), _vocabulary(model)
        else:
            own, outputs = heads(model, missing, layers), recipe.outputs
        precision = torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32
        pin(model, layers, precision)
        model.to(device).eval().requires_grad_(requires_grad=False)
        where = torch.device(device)
        made = cls(model, codec, layers, depth, own, as_tuple=False, outputs=outputs, precision=precision, device=where)
        return replace(made, as_tuple=_first_run(made))

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

    @property
    def lengths(self) -> tuple[int, ...]:
        """Sequence lengths that the layers see; the last is the longest."""
        return self.codec.lengths

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Each input as the model takes it: token ids cut to `max_tokens`, or pixels; a function of it alone.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        return self.codec.encode(inputs)

    def examples(self, recipe: Recipe, records: Sequence[Record]) -> list[Encoded]:
        """What is trained on, of each record: its input, with the answer where the task is completion.

        Raises:
            RecipeError: an input is not what the recipe says.
        """
        if isinstance(self.codec, Prompts):
            return self.codec.pairs(records)
        return self.codec.encode(inputs_of(recipe, records))

    def length(self, encoded: Encoded) -> int:
        """Sequence length of an input by itself; the same for all images."""
        return self.codec.length(encoded)

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:
        """Inputs side by side, each filled up to exactly `length` on the right."""
        return self.codec.collate(encoded, length)

    def made_up(self, rows: int, length: int) -> Batch:
        """Made-up inputs of all lengths up to `length`, some of them full, the same in every process."""
        return self.codec.collate(self.codec.made_up(rows, length), length)


def _read(directory: Path, recipe: Recipe) -> tuple[Any, set[str]]:
    """The model and the names of weights that its files lack."""
    kind: Any = AutoModelForSequenceClassification
    own: dict[str, Any] = {"num_labels": recipe.outputs, "ignore_mismatched_sizes": True}
    if recipe.task == "completion":
        kind, own = AutoModelForCausalLM, {}
    elif recipe.input == "image":
        kind = AutoModelForImageClassification
    transformers.logging.disable_progress_bar()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # a table of "newly initialised" weights: the head, as meant
    try:
        model, info = kind.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            **own,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(f"{directory} cannot be loaded as {kind.__name__}: {error}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    model.config.use_cache = False
    return model, set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}


def _vocabulary(model: Any) -> int:
    if (last := model.get_output_embeddings()) is None:
        raise BackboneError(f"{type(model).__name__} names no output embeddings, so it cannot complete a text")
    return last.out_features


def _codec(directory: Path, recipe: Recipe, model: Any, device: torch.device) -> Codec:
    if recipe.input == "image":
        return Images(directory, device)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    codec = (Prompts if recipe.task == "completion" else Texts)(directory, recipe, vocabulary, device)
    model.config.pad_token_id = codec.tokenizer.pad_token_id
    return codec


def _first_run(backbone: Backbone) -> bool:
    """Run the model once at full length: whether its layers return tuples; for images, how long their sequences are.

    Raises:
        BackboneError: it does not run, or its layers do not keep one row per input.
    """
    seen: list[tuple[Any, Any]] = []
    layers: Any = backbone.model.get_submodule(backbone.layers)
    hook = layers[0].register_forward_hook(lambda _m, _a, output: seen.append((type(output), output)))
    longest = backbone.lengths[-1]
    try:
        with torch.no_grad(), backbone.autocast():
            backbone.model(**backbone.made_up(3, longest).inputs)
    except (IndexError, RuntimeError, ValueError, TypeError) as error:
        if is_shortage(error):
            raise
        raise BackboneError(
            f"the backbone does not run on inputs of {longest} tokens ({error}): lower max_tokens, or take another one"
        ) from None
    finally:
        hook.remove()
    kind, output = seen[0]
    hidden = output[0] if issubclass(kind, tuple) else output
    if hidden.dim() != 3 or hidden.shape[0] != 3:
        raise BackboneError(
            f"layers {backbone.layers} give {tuple(hidden.shape)} for 3 inputs, not (inputs, length, width): this kind "
            "of backbone is not supported; take one whose layers keep one row per input"
        )
    if isinstance(backbone.codec, Images):
        backbone.codec.lengths = (hidden.shape[1],)
    return issubclass(kind, tuple)
