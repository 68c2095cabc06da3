"""From a caller's input to what the model's forward takes: each input on its own, then rows side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from shards.engine.interface import Input
from shards.engine.window import Batch
from shards.errors import BackboneError, InputError
from shards.images import ImageError, decoded
from shards.recipe import Recipe

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Padded lengths; which one is used is decided by the input's own token count."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One input as the model takes it; a function of that input alone."""

    ids: Sequence[int] = ()
    """Token ids of a text, cut to `max_tokens`."""
    pixels: Tensor | None = None
    """(channels, height, width) of an image; None where only its shape still counts, above the trunk."""
    answer: int | None = None
    """Of a causal language model: how many of the ids are the prompt. None where an input is nothing else."""


class Codec(Protocol):
    """How one kind of input is encoded and put side by side."""

    lengths: tuple[int, ...]
    """Sequence lengths that the layers see; the last is the longest."""

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Each input on its own."""
        ...

    def length(self, encoded: Encoded) -> int:
        """Sequence length of an input without padding."""
        ...

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:
        """Inputs as rows, each filled up to exactly `length`."""
        ...

    def made_up(self, rows: int, length: int) -> list[Encoded]:
        """Inputs of all lengths, some of them full, the same in every process."""
        ...


class Texts:
    """Texts through the backbone's tokenizer."""

    def __init__(self, directory: Path, recipe: Recipe, vocabulary: int, device: torch.device) -> None:
        """Read the tokenizer.

        Raises:
            BackboneError: there is none, or it cannot pad.
        """
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BackboneError(f"{directory} holds no tokenizer that loads: {error}") from None
        words: Any = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        if hasattr(words, "_resize_cache"):  # BPE and Unigram remember words of texts, past these texts' erasure
            words._resize_cache(0)  # noqa: SLF001
            words._clear_cache()  # noqa: SLF001
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise BackboneError("the backbone's tokenizer has neither a padding nor an end token; add one to its files")
        self.lengths = buckets(recipe.max_tokens)
        self._max = recipe.max_tokens
        end = self.tokenizer.eos_token_id
        self._nothing = [self.tokenizer.pad_token_id if end is None else end]
        """Stands for an empty text, where the tokenizer puts nothing around it: a row must not be all padding."""
        self._vocabulary = vocabulary
        self._device = device

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Token ids of each text, cut to `max_tokens`."""
        if not inputs:
            return []
        texts = [str(text) for text in inputs]
        found = self.tokenizer(texts, truncation=True, max_length=self._max)["input_ids"]
        return [Encoded(ids or self._nothing) for ids in found]

    def length(self, encoded: Encoded) -> int:
        """Number of tokens."""
        return len(encoded.ids)

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:
        """Token ids and mask (rows, length), filled up on the right."""
        filler = self.tokenizer.pad_token_id
        ids = torch.tensor([[*each.ids, *[filler] * (length - len(each.ids))] for each in encoded], device=self._device)
        mask = torch.tensor([[1] * len(each.ids) + [0] * (length - len(each.ids)) for each in encoded])
        return Batch({"input_ids": ids, "attention_mask": mask.to(self._device)})

    def made_up(self, rows: int, length: int) -> list[Encoded]:
        """Random token ids."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self._vocabulary, (rows, length), generator=generator).tolist()
        lengths = [length if row % 6 == 0 else 2 + (row * 7) % (length - 2) for row in range(rows)]
        return [Encoded(row[:size]) for row, size in zip(ids, lengths, strict=True)]


class Images:
    """Image files through the backbone's image processor, one by one."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Read the image processor.

        Raises:
            BackboneError: there is none, or it makes images of several sizes.
        """
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(directory, local_files_only=True, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            raise BackboneError(f"{directory} holds no image processor that loads: {error}") from None
        shapes = {tuple(self._pixels(Image.new("RGB", size)).shape) for size in ((64, 48), (48, 64), (500, 300))}
        if len(shapes) != 1:
            raise BackboneError(
                f"the image processor of {directory} makes images of several sizes ({sorted(shapes)}): set a "
                "fixed size (do_resize, do_center_crop) in preprocessor_config.json"
            )
        self.shape: tuple[int, ...] = shapes.pop()
        self.lengths: tuple[int, ...] = (1,)
        """Set by the backbone to the sequence length that its layers see."""
        self._device = device

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Pixels of each PNG or JPEG file, upright and in RGB.

        Raises:
            InputError: an input is no such file.
        """
        return [Encoded(pixels=self._pixels(_decoded(data))) for data in inputs]

    def length(self, encoded: Encoded) -> int:  # noqa: ARG002 - every image has the same
        """Sequence length in the layers."""
        return self.lengths[-1]

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:  # noqa: ARG002
        """Pixels (rows, channels, height, width); zeros for an image whose pixels were let go."""
        rows = [torch.zeros(self.shape) if each.pixels is None else each.pixels for each in encoded]
        return Batch({"pixel_values": torch.stack(rows).to(self._device)})

    def made_up(self, rows: int, length: int) -> list[Encoded]:  # noqa: ARG002
        """Random pixels."""
        generator = torch.Generator().manual_seed(0)
        return [Encoded(pixels=torch.randn(self.shape, generator=generator)) for _ in range(rows)]

    def _pixels(self, image: Image.Image) -> Tensor:
        return self._processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def buckets(max_tokens: int) -> tuple[int, ...]:
    """Padded lengths in use, the last being `max_tokens`."""
    return (*(length for length in BUCKETS if length < max_tokens), max_tokens)


def _decoded(data: Input) -> Image.Image:
    try:
        return decoded(data if isinstance(data, bytes) else data.encode())
    except ImageError as error:
        raise InputError(f"input: {error}") from None
