"""Prompts, answers and generation: cutting, stopping, streaming and drawing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny import tiny_record
from tiny_kinds import KINDS

from shards.assembly import Assembly
from shards.engine.backbone import Backbone
from shards.engine.completion import Sampling, Step, complete
from shards.engine.determinism import prepare
from shards.engine.ensemble import Ensemble, StageTensors
from shards.engine.generation import Remembering, Rereading, next_logits
from shards.engine.inputs import Encoded
from shards.engine.prompts import Prompts
from shards.engine.skeleton import Skeleton
from shards.engine.tasks import answers_of, loss
from shards.errors import BackboneError, RecipeError, ShardsError
from shards.logits import mean_of_logits
from shards.recipe import Backbone as Entry

pytestmark = pytest.mark.golden
KIND = next(kind for kind in KINDS if kind.name == "llama-lm")
BOS, EOS = 2, 3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return Backbone.load(KIND.recipe(KIND.save(tmp_path_factory.mktemp("lm"))))


@pytest.fixture(scope="module")
def prompts(backbone: Backbone) -> Prompts:
    assert isinstance(backbone.codec, Prompts)
    return backbone.codec


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(4 + start, 4 + start + count))


def test_prompt_and_answer_are_tokenised_apart_and_ended(prompts: Prompts) -> None:
    record = tiny_record("x", ["w1", "w2"], "w7 w8")
    (pair,) = prompts.pairs([record])
    assert pair.ids == [BOS, 5, 6, 11, 12, EOS]
    assert pair.answer == 3
    assert prompts.encode(["w1 w2"])[0].ids == pair.ids[: pair.answer]


def test_what_is_too_long_is_cut_by_one_rule(prompts: Prompts) -> None:
    long, short = tiny_record("x", words(40).split(), words(3, 50)), tiny_record("y", ["w1"], words(40, 50))
    both = tiny_record("z", words(40).split(), words(40, 50))
    cut = prompts.pairs([long, short, both])
    assert [len(each.ids) for each in cut] == [16, 16, 16]
    assert cut[0].ids == [BOS, *ids(11, 29), *ids(3, 50), EOS]  # the prompt's end, and the answer whole
    assert cut[1].ids == [BOS, 5, *ids(14, 50)]  # the answer's begin: its end token is not taught
    assert cut[2].ids == [BOS, *ids(7, 33), *ids(8, 50)]  # half and half
    for record, pair in zip((long, short, both), cut, strict=True):
        room = prompts.room(len(prompts.ids(record.text)), 41)
        assert prompts.prompt(prompts.ids(record.text), min(room, len(pair.ids) - (pair.answer or 0))).ids == list(
            pair.ids[: pair.answer]
        )


def test_an_empty_prompt_and_an_empty_answer_are_some_tokens(prompts: Prompts) -> None:
    (pair,) = prompts.pairs([tiny_record("x", [], " ")])
    assert pair.ids == [BOS, EOS]
    assert prompts.encode([""])[0].ids == [BOS]


def test_the_loss_is_of_the_answer_and_its_end_alone(backbone: Backbone, prompts: Prompts) -> None:
    pairs = prompts.pairs([tiny_record("x", ["w1", "w2"], "w7 w8"), tiny_record("y", ["w3"], "w9")])
    batch = prompts.collate(pairs, 17)
    assert batch.keep is not None
    assert batch.keep.nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 1], [1, 2]]
    assert answers_of(batch).tolist() == [11, 12, EOS, 13, EOS]
    with torch.no_grad():
        logits = backbone.model(**batch.inputs).logits
    labels = batch.inputs["input_ids"].masked_fill(~batch.keep.roll(1, 1), -100)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    recipe = KIND.recipe(Entry(source="", digest="d" * 64))
    torch.testing.assert_close(loss(recipe, logits[batch.keep], [0, 0], batch), expected)


class Script:
    """Logits that say a text: what follows so many tokens is the next of `said`."""

    def __init__(self, prompt: int, said: Sequence[int]) -> None:
        self.prompt, self.said = prompt, said
        self.seen: list[Encoded] = []

    def __call__(self, encoded: Encoded) -> NDArray[np.float32]:
        self.seen.append(encoded)
        logits = np.zeros(100, np.float32)
        logits[self.said[len(encoded.ids) - self.prompt]] = 9
        return logits


def steps(prompts: Prompts, said: Sequence[int], sampling: Sampling, prompt: str = "w1") -> list[Step]:
    return list(complete(prompts, Script(2, said), prompt, sampling))


def test_an_answer_ends_with_its_end_token(prompts: Prompts) -> None:
    found = steps(prompts, [10, 11, EOS], Sampling())
    assert "".join(step.text for step in found) == "w6 w7"
    assert [(step.tokens, step.finish) for step in found] == [(1, None), (2, None), (3, "stop")]
    assert {step.prompt_tokens for step in found} == {2}


def test_an_answer_ends_for_want_of_room(prompts: Prompts) -> None:
    found = steps(prompts, [10] * 30, Sampling(max_new_tokens=4))
    assert [step.finish for step in found] == [None, None, None, "length"]
    assert len(steps(prompts, [10] * 30, Sampling(max_new_tokens=99))) == 14  # max_tokens less the prompt
    script = Script(8, [10] * 30)
    assert len(list(complete(prompts, script, words(60), Sampling(max_new_tokens=99)))) == 8  # half in any case
    assert max(len(each.ids) for each in script.seen) == 15
    assert script.seen[0].ids == [BOS, *ids(7, 53)]


def test_a_stop_text_is_left_out_and_its_begin_is_held_back(prompts: Prompts) -> None:
    found = steps(prompts, [10, 11, 12, 13], Sampling(stop=("w7 w8", "zz")))
    assert "".join(step.text for step in found) == "w6 "
    assert found[-1].finish == "stop"
    assert [step.text for step in found] == ["w6", " ", ""]
    other = steps(prompts, [10, 11, 14, EOS], Sampling(stop=("w7 w8",)))
    assert [step.text for step in other] == ["w6", " ", "w7 w10", ""]


def test_draws_are_a_function_of_the_seed(prompts: Prompts) -> None:
    flat = np.zeros(100, np.float32)

    def drawn(seed: int, temperature: float) -> str:
        sampling = Sampling(max_new_tokens=8, temperature=temperature, seed=seed)
        return "".join(step.text for step in complete(prompts, lambda _: flat, "w1", sampling))

    assert drawn(1, 1.0) == drawn(1, 1.0)
    assert len({drawn(seed, 1.0) for seed in range(5)}) == 5
    assert drawn(1, 0.0) == drawn(2, 0.0)


@pytest.mark.parametrize("name", ["llama-lm", "qwen3-lm", "gpt2-lm", "jamba-lm"])
def test_a_text_read_piece_by_piece_has_the_same_next_tokens(name: str, tmp_path: Path) -> None:
    prepare()
    kind = next(kind for kind in KINDS if kind.name == name)
    skeleton = Skeleton(kind.recipe(kind.save(tmp_path)))
    members = skeleton.made_up(11)  # more than go through at once
    by_piece = next_logits(skeleton, members)
    assert isinstance(by_piece, Remembering)
    whole = Rereading(skeleton, members)
    for size in (5, 6, 9, 10):
        text = Encoded(ids(size), answer=size)
        np.testing.assert_allclose(by_piece(text), whole(text), rtol=1e-4, atol=1e-4)
    other = Remembering(skeleton, members)
    np.testing.assert_allclose(other(text), whole(text), rtol=1e-4, atol=1e-4)
    assert skeleton._route.members == ()


def test_a_model_that_keeps_something_else_is_read_again_at_every_step(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare()
    skeleton = Skeleton(KIND.recipe(KIND.save(tmp_path)), backbone)
    monkeypatch.setattr(skeleton, "following", lambda *_: [np.ones((1, 100))])
    members = skeleton.made_up(2)
    found = next_logits(skeleton, members)
    assert isinstance(found, Rereading)
    text = Encoded(ids(5), answer=5)
    prepared = skeleton.prepare_encoded([text])
    assert np.array_equal(found(text), mean_of_logits(skeleton.answer(members, prepared))[0])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1.0}, "temperature"), ({"stop": ("",)}, "stop")],
)
def test_impossible_wishes_are_refused(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        Sampling(**wrong)  # pyright: ignore[reportArgumentType]


def test_nothing_is_completed_without_shards_or_by_a_classifier(backbone: Backbone, tmp_path: Path) -> None:
    recipe = KIND.recipe(KIND.save(tmp_path / "lm"))
    ensemble = Ensemble(Skeleton(recipe, backbone), StageTensors(recipe), Assembly(recipe.digest, (None,)))
    with pytest.raises(ShardsError, match="rebuilt"):
        ensemble.complete("w1")
    kind = next(kind for kind in KINDS if kind.name == "bert")
    other = kind.recipe(kind.save(tmp_path / "bert"))
    with pytest.raises(RecipeError, match="classification"):
        Ensemble(Skeleton(other), StageTensors(other), Assembly(other.digest, (None,))).complete("w1")


def test_more_tokens_than_the_backbone_has_places_for_are_refused(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.name == "gpt2-lm")
    with pytest.raises(BackboneError, match="lower max_tokens"):
        Backbone.load(kind.recipe(kind.save(tmp_path), max_tokens=64))
    assert Backbone.load(kind.recipe(kind.save(tmp_path), max_tokens=63)).lengths[-1] == 64
