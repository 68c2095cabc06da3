"""What a failed training says of itself, on its job's row, in events and logs, holds nothing of a record."""

import ast
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_engine_external import COMMANDS
from test_engine_external import recipe as external
from test_engine_ridge import ridge_recipe
from test_engine_sisa import module_recipe, vector_record
from tiny import manifest_root, tiny_backbone, tiny_recipe, tiny_record
from tiny_kinds import KINDS

from shards.engine.determinism import prepare
from shards.engine.registry import open_trainer
from shards.errors import DivergedError, InputError, MemoryShortageError, ModuleError, RecipeError
from shards.manifest import Record, check_records
from shards.recipe import Recipe
from shards.stages import chain
from workers.failures import TOLD, told

ROOT = Path(__file__).parents[1]
CANARY = "canary 0123456789"
Case = tuple[Recipe, Record]
VIT = next(kind for kind in KINDS if kind.name == "vit")


def s3t_label(place: Path) -> Case:
    return tiny_recipe(tiny_backbone(place)), tiny_record("r", label=CANARY)


def s3t_number(place: Path) -> Case:
    return tiny_recipe(tiny_backbone(place), task="regression", classes=()), tiny_record("r", label=CANARY)


def s3t_text(place: Path) -> Case:
    return tiny_recipe(tiny_backbone(place)), tiny_record("r", words=[CANARY, "\ud800"])


def s3t_image(place: Path) -> Case:
    record = dataclasses.replace(tiny_record("r"), image=b"\x89PNG\r\n\x1a\n" + CANARY.encode())
    return VIT.recipe(VIT.save(place)), record


def ridge_label(place: Path) -> Case:
    return ridge_recipe(tiny_backbone(place)), tiny_record("r", label=CANARY)


def sisa_label(_place: Path) -> Case:
    return module_recipe(), vector_record("r", label=CANARY)


def sisa_vector(_place: Path) -> Case:
    return module_recipe(), dataclasses.replace(vector_record("r"), text=json.dumps([CANARY] * 6))


def command_fails(_place: Path) -> Case:
    return external("fail"), tiny_record("r", words=[CANARY])


def command_is_killed(_place: Path) -> Case:
    return external("killed"), tiny_record("r", words=[CANARY])


def command_chokes(_place: Path) -> Case:
    return external("good"), tiny_record("r", label=CANARY)


def failure_of(recipe: Recipe, records: Sequence[Record], between: Callable[[], Any] | None = None) -> Exception:
    """How training those records fails, with a trainer that was opened before."""
    prepare()
    trainer = open_trainer(recipe, commands=COMMANDS)
    (stage, *_) = chain(recipe.digest, 0, range(recipe.slices), dict.fromkeys(range(recipe.slices), "0" * 64))
    if between:
        between()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is
        trainer.train(stage, records, [])
    return caught.value


@pytest.mark.parametrize(
    "case",
    [s3t_label, s3t_number, s3t_text, s3t_image, ridge_label, sisa_label, sisa_vector, command_fails,
     command_is_killed, command_chokes],
    ids=lambda case: case.__name__,
)  # fmt: skip
def test_no_engine_tells_of_what_it_could_not_read(case: Callable[[Path], Case], tmp_path: Path) -> None:
    recipe, record = case(tmp_path)
    failure = failure_of(recipe, [record])
    said = told(failure, at_hand=True)
    assert said.startswith(type(failure).__name__)
    assert not any(word in said for word in (CANARY, *CANARY.split(), "0123"))


def _quoting(kind: type[Exception]) -> Callable[..., Any]:
    def forward(_self: object, rows: torch.Tensor, **_: Any) -> torch.Tensor:
        raise kind(f"out of luck: {CANARY} {rows.tolist()}")

    return forward


class OwnError(DivergedError):
    """A user's error that passes for one of ours."""


@pytest.mark.parametrize("kind", [ValueError, KeyError, RecipeError, OwnError, RuntimeError, StopIteration])
def test_a_users_module_is_not_quoted(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises: in its forward pass, and in its constructor, which may have kept what a pass was given."""
    records = [vector_record("r")]
    failure = failure_of(
        module_recipe(), records, lambda: monkeypatch.setattr("toy_module.Plain.forward", _quoting(kind))
    )
    assert "canary" not in told(failure, at_hand=True)
    monkeypatch.undo()

    def construct(_self: object, **_: Any) -> None:
        raise kind(CANARY)

    failure = failure_of(module_recipe(), records, lambda: monkeypatch.setattr("toy_module.Plain.__init__", construct))
    assert type(failure) is ModuleError
    assert told(failure, at_hand=True) == "ModuleError"


def test_no_shortage_of_memory_quotes_the_error_that_told_of_it() -> None:
    with patch("torch.nn.functional.cross_entropy", side_effect=RuntimeError(f"{CANARY}: out of memory")):
        failure = failure_of(module_recipe(), [vector_record("r")])
    assert type(failure) is MemoryShortageError
    assert told(failure, at_hand=True).startswith("MemoryShortageError: memory ran out while training stage")
    assert "canary" not in str(failure)


def test_other_errors_are_their_class() -> None:
    with pytest.raises(Exception, match="manifest") as caught:
        check_records([tiny_record("r", words=[CANARY])], manifest_root([tiny_record("s")]))
    assert told(caught.value, at_hand=True) == "ManifestMismatchError"
    assert told(InputError(CANARY), at_hand=True) == "InputError"
    assert told(ValueError(CANARY), at_hand=False) == "ValueError"
    assert told(ModuleError("module.path: why"), at_hand=False) == "ModuleError: module.path: why"


FREE = {
    "adapters.py": {"list(lora.targets)"},
    "ensemble.py": {"assembly.recipe[:12]", "skeleton.digest[:12]", "self._skeleton.recipe.task"},
    "external.py": {
        "bad", "len(tensors)", "recipe.command", "self.recipe.command", "ended", "type(error).__name__",
        "error.strerror",
    },
    "interface.py": {"stage.key[:12]", "stage.recipe[:12]", "recipe.digest[:12]"},
    "memory.py": {"doing", "_FIELDS[recipe.engine]"},
    "modules.py": {
        "name", "found[:12]", "module.digest[:12]", "module.path", "attribute", "value.__module__", "path",
    },
    "networks.py": {"self._module.path", "shape", "wanted", "problem"},
    "registry.py": {"recipe.device", "device"},
    "ridge_reader.py": {"assembly.recipe[:12]", "self._digest[:12]"},
    "sampling.py": {"self.max_new_tokens"},
    "s3t.py": {"step", "self.recipe.learning_rate", "self.recipe.head_learning_rate"},
    "sisa.py": {"number"},
    "sisa_reader.py": {"assembly.recipe[:12]", "self.digest[:12]"},
    "structure.py": {
        "recipe.trunk_layers", "depth", "recipe.slices", "recipe.layers_per_slice", "depth - trained",
        "sorted(unused)", "sorted(names)",
    },
    "sums.py": {"records", "self.clip", "self.bits", "self.penalty", "least"},
}  # fmt: skip
"""What the messages of `TOLD` errors are made of, by file. Before you add to it: can it come from a record?"""


@pytest.mark.parametrize("path", [*sorted((ROOT / "shards/engine").glob("*.py")), ROOT / "shards/sums.py",
                                  ROOT / "shards/manifest.py"], ids=lambda path: path.name)  # fmt: skip
def test_messages_are_made_of_steps_files_and_fields_of_the_recipe(path: Path) -> None:
    """Every raise that a trainer can reach, also those that no test provokes. Those with a cause are never told."""
    told_names = {kind.__name__ for kind in TOLD}
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)):
            continue
        if node.exc.func.id not in told_names or isinstance(node.cause, ast.Name):
            continue
        for argument in node.exc.args:
            assert isinstance(argument, ast.Constant | ast.JoinedStr), ast.unparse(node)
            parts = {ast.unparse(part.value) for part in ast.walk(argument) if isinstance(part, ast.FormattedValue)}
            assert parts <= FREE.get(path.name, set()), ast.unparse(node)
