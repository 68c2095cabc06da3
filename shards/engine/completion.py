"""Generation from a causal language model: one token after the other, from logits that somebody computes."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards.engine.inputs import Encoded
from shards.engine.prompts import Prompts
from shards.engine.sampling import Sampling, Step

NextLogits = Callable[[Encoded], npt.NDArray[np.float32]]
"""Logits (vocabulary,) of the token that follows a prompt."""


def complete(prompts: Prompts, next_logits: NextLogits, prompt: str, sampling: Sampling) -> Iterator[Step]:
    """Draw an answer, token by token."""
    ids = prompts.ids(prompt)
    room = prompts.room(len(ids), sampling.max_new_tokens)
    begun = prompts.prompt(ids, room)
    draws = np.random.default_rng(sampling.seed)
    drawn: list[int] = []
    sent = 0
    while True:
        encoded = Encoded([*begun.ids, *drawn], answer=len(begun.ids) + len(drawn))
        token = _draw(next_logits(encoded), sampling.temperature, draws)
        ended = token == prompts.end
        drawn.append(token)
        text = prompts.text(drawn[:-1] if ended else drawn)
        cut = min((at for at in map(text.find, sampling.stop) if at >= 0), default=None)
        full = len(drawn) >= room
        last = ended or cut is not None or full
        safe = text[:cut] if last else text[: len(text) - _held_back(text, sampling.stop)]
        finish = ("stop" if ended or cut is not None else "length") if last else None
        yield Step(safe[sent:], len(drawn), len(begun.ids), finish)
        if last:
            return
        sent = max(sent, len(safe))


def _draw(logits: npt.NDArray[np.float32], temperature: float, draws: np.random.Generator) -> int:
    """The most likely token, the lowest of equals; or one drawn by the softmax of the logits."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    shares = np.exp(scaled).cumsum()
    return int(np.searchsorted(shares, draws.random() * shares[-1], side="right"))


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How many letters at the end may not go out yet."""
    if text.endswith("\ufffd"):  # a letter of several tokens, not yet whole
        return 1
    fits = (size for word in stop for size in range(1, len(word)) if text.endswith(word[:size]))
    return max(fits, default=0)
