"""The baseline: SISA (arXiv 1912.03817) with full fine-tuning, made as fast as it can be on one thread.

A deletion hits one slice of one shard; the model goes back to the snapshot before that slice, and is trained on with
every later slice. SISA owes nobody bit-equality with another process, so unlike our stages it may take batches of
like length, padded to the longest of the batch alone, and the arithmetic and attention that are fastest here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from benchmarks import children

SHARDS, SLICES = 4, 3
EPOCHS = 3
"""e': epochs of plain training with the same work; each of R slices gets 2e'/(R+1) epochs."""
BATCH = 32
LEARNING_RATE = 5e-5
TRIED = tuple((dtype, attention) for dtype in (torch.float32, torch.bfloat16) for attention in ("eager", "sdpa"))
"""Arithmetic (bfloat16: autocast) and attention; the fastest on a few batches is taken."""
TRIAL_BATCHES = 2


@dataclass(frozen=True, slots=True)
class Job:
    """One shard: texts and class numbers, slice after slice."""

    encoder: str
    max_tokens: int
    slices: Sequence[Sequence[tuple[str, int]]]


@dataclass(frozen=True, slots=True)
class Retraining:
    """What deletions from the shard cost."""

    seconds: float
    """Mean over the slice that a uniformly random record lies in."""
    slice_seconds: tuple[float, ...]
    """Training with slice 0, 1, ... added, its snapshot restored before and taken after."""
    arithmetic: str
    attention: str
    losses: tuple[float, ...]
    """Mean training loss with each slice: it should fall."""


def steps(rows: Sequence[int]) -> int:
    """Optimizer steps of all slices, given their sizes; what `retrain` ticks."""
    return sum(_steps(sum(rows[: number + 1])) for number in range(len(rows)))


def retrain(job: Job) -> Retraining:
    """In a process of its own: train each slice once, and add up what a hit on each of them costs.

    A hit on slice r trains r, r+1, ... as they were trained at first, so each is timed only once.
    """
    tokenizer = AutoTokenizer.from_pretrained(job.encoder, local_files_only=True)
    slices = [[(_ids(tokenizer, text, job.max_tokens), label) for text, label in rows] for rows in job.slices]
    dtype, attention = _fastest(job.encoder, [row for rows in slices for row in rows])
    trainer = _Trainer(job.encoder, dtype, attention)
    seconds: list[float] = []
    losses: list[float] = []
    snapshot = trainer.snapshot()
    for number in range(len(slices)):
        began = time.perf_counter()
        trainer.restore(snapshot)
        losses.append(trainer.train([row for rows in slices[: number + 1] for row in rows]))
        snapshot = trainer.snapshot()
        seconds.append(time.perf_counter() - began)
    hits = [len(rows) * sum(seconds[number:]) for number, rows in enumerate(slices)]
    mean = sum(hits) / sum(map(len, slices))
    return Retraining(mean, tuple(seconds), str(dtype).removeprefix("torch."), attention, tuple(losses))


Row = tuple[list[int], int]


class _Trainer:
    """A classifier of which everything is trained."""

    def __init__(self, encoder: str, dtype: torch.dtype, attention: str) -> None:
        logging.set_verbosity_error()  # a table of "newly initialised" weights: the head, as meant
        logging.disable_progress_bar()
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(mode=False)  # it need not pay for what it does not promise
        self._dtype = dtype
        self._model: Any = AutoModelForSequenceClassification.from_pretrained(
            encoder, num_labels=2, local_files_only=True, dtype=torch.float32, attn_implementation=attention
        ).train()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all weights."""
        return {name: tensor.clone() for name, tensor in self._model.state_dict().items()}

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to a copy."""
        self._model.load_state_dict(snapshot)

    def train(self, rows: Sequence[Row], most: int | None = None) -> float:
        """Train on cumulative slices, by the epoch rule; mean loss. At most `most` steps."""
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, fused=True)
        losses: list[Tensor] = []
        batches = _batches(rows)
        for _ in range(most or _steps(len(rows))):
            ids, mask, labels = next(batches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype is torch.bfloat16):
                logits = self._model(input_ids=ids, attention_mask=mask).logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if most is None:
                children.tick()
        return float(torch.stack(losses).mean())


def _fastest(encoder: str, rows: Sequence[Row]) -> tuple[torch.dtype, str]:
    """The arithmetic and attention with the quickest steps; the first step of each is outside the clock."""
    taken: dict[tuple[torch.dtype, str], float] = {}
    for dtype, attention in TRIED:
        trainer = _Trainer(encoder, dtype, attention)
        trainer.train(rows, 1)
        began = time.perf_counter()
        trainer.train(rows, TRIAL_BATCHES)
        taken[dtype, attention] = time.perf_counter() - began
    return min(taken, key=lambda way: taken[way])


def _steps(rows: int) -> int:
    return max(1, round(2 * EPOCHS / (SLICES + 1) * rows / BATCH))


def _batches(rows: Sequence[Row]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Epoch after epoch, shuffled, in batches of like length: ids, mask, labels. Token 0 fills up."""
    generator = torch.Generator().manual_seed(0)
    while True:
        shuffled = torch.randperm(len(rows), generator=generator).tolist()
        near = sorted(shuffled, key=lambda place: len(rows[place][0]))
        cuts = [near[at : at + BATCH] for at in range(0, len(near), BATCH)]
        for cut in torch.randperm(len(cuts), generator=generator).tolist():
            batch = [rows[place] for place in cuts[cut]]
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in batch])
            yield ids, mask, torch.tensor([label for _, label in batch])


def _ids(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    return tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
