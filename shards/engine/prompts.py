"""Prompts and answers of a causal language model, as token ids."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from shards.engine.inputs import Encoded, Texts
from shards.engine.interface import Input
from shards.engine.window import Batch
from shards.errors import BackboneError
from shards.manifest import Record
from shards.recipe import Recipe


class Prompts(Texts):
    """Texts to go on from. Prompt and answer are tokenised apart, so a prompt has the same ids with and without one.

    What is too long is cut by one rule, in training and in serving: the answer may take what the prompt leaves of
    `max_tokens`, and half of it in any case; the prompt keeps its last tokens in what is left.
    """

    def __init__(self, directory: Path, recipe: Recipe, vocabulary: int, device: torch.device) -> None:
        """Read the tokenizer.

        Raises:
            BackboneError: there is none, or it knows no end token.
        """
        super().__init__(directory, recipe, vocabulary, device)
        end = self.tokenizer.eos_token_id
        if end is None:
            raise BackboneError(
                "the backbone's tokenizer has no end token, so no answer could end; add one to its files"
            )
        self.end: int = end
        """The token that ends an answer."""
        start = self.tokenizer.bos_token_id
        begun = self.tokenizer("").input_ids
        self._start: list[int] = [start] if start is not None and begun[:1] == [start] else []
        # A row without padding would let torch skip the mask, for all rows or none: bits would depend on neighbours.
        self.lengths = tuple(length + 1 for length in self.lengths)

    def encode(self, inputs: Sequence[Input]) -> list[Encoded]:
        """Prompts, of which the next token is asked for."""
        return [self.prompt(ids) for ids in self._ids(inputs)]

    def prompt(self, ids: Sequence[int], room: int = 0) -> Encoded:
        """A prompt of these ids that leaves `room` of `max_tokens` for an answer."""
        kept = self._cut(ids, self._max - self.room(len(ids), room))
        return Encoded(kept, answer=len(kept))

    def pairs(self, records: Sequence[Record]) -> list[Encoded]:
        """Prompts with their answers and the end token."""
        prompts = self._ids(record.text for record in records)
        answers = self._ids(record.label for record in records)
        found: list[Encoded] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            whole = [*answer, self.end]
            wanted = whole[: self.room(len(prompt), len(whole))]
            kept = self._cut(prompt, self._max - len(wanted))
            found.append(Encoded([*kept, *wanted], answer=len(kept)))
        return found

    def room(self, prompt: int, wanted: int) -> int:
        """How many of the `wanted` tokens an answer to a prompt of so many ids may have."""
        begin = max(1, len(self._start)) if not prompt else len(self._start)
        return min(wanted, max(self._max // 2, self._max - prompt - begin))

    def collate(self, encoded: Sequence[Encoded], length: int) -> Batch:
        """Token ids and mask (rows, length); kept are the positions before each token of the answer.

        Of a prompt alone that is its last one, which the first token of an answer would follow.
        """
        plain = super().collate(encoded, length)
        keep = torch.zeros(len(encoded), length, dtype=torch.bool)
        for row, each in enumerate(encoded):
            start = len(each.ids) if each.answer is None else each.answer
            keep[row, start - 1 : max(start, len(each.ids) - 1)] = True
        return Batch(plain.inputs, keep.to(self._device))

    def length(self, encoded: Encoded) -> int:
        """Number of tokens, and the place of padding that every row has."""
        return len(encoded.ids) + 1

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, with nothing put before or behind it."""
        return self._ids([text])[0]

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, without special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def made_up(self, rows: int, length: int) -> list[Encoded]:
        """Random prompts, each of which leaves a place of padding."""
        return [Encoded(each.ids, answer=len(each.ids)) for each in super().made_up(rows, length - 1)]

    def _ids(self, texts: Iterable[Input]) -> list[list[int]]:
        given = [str(text) for text in texts]
        return self.tokenizer(given, add_special_tokens=False)["input_ids"] if given else []

    def _cut(self, ids: Sequence[int], room: int) -> list[int]:
        """The start token, where the tokenizer puts one, and the last ids; never nothing at all."""
        start = self._start or ([] if ids else [self.end])
        kept = room - len(start)
        return [*start, *ids[max(0, len(ids) - kept) :]]
