"""One test for each error in what runs around the published S3T code (facts/exact-unlearning.md, section 4.2).

Each was seen to fail on a copy of this code into which the error, or its nearest like, had been put.
"""

import dataclasses
import importlib
import itertools
import math
import pkgutil
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
from exact import served, train_chain
from key_store import open_local
from test_docs import AHEAD, PAGES, ROOT
from test_engine_sisa import module_recipe, vector_record
from tiny import World, tiny_backbone, tiny_recipe, tiny_record, tiny_records

import shards
from service.cli.main import app
from service.store.artifacts import ArtifactMissingError
from shards.assembly import Assembly
from shards.capacity import all_dead_uniform
from shards.engine.artifacts import decode
from shards.engine.determinism import prepare, stage_seed
from shards.engine.interface import inputs_of
from shards.engine.registry import open_trainer
from shards.errors import RecipeError
from shards.plan import assemble, missing, tainted
from shards.recipe import Backbone, Recipe
from shards.stages import CellRoot, Stage, chain

pytestmark = pytest.mark.golden
Roots = dict[int, dict[int, str]]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    prepare()
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), width=16, inner=32)


def grid(shards_: int, slices: int, orders: int) -> tuple[Recipe, Roots, dict[str, Stage]]:
    """A recipe, the roots of its cells, and every stage that it plans."""
    recipe = tiny_recipe(Backbone(source="/somewhere", digest="d" * 64), shards=shards_, slices=slices, orders=orders)
    roots = {shard: {piece: f"root {shard} {piece}" for piece in range(slices)} for shard in range(shards_)}
    return recipe, roots, {stage.key: stage for stage in missing(recipe, roots, set())}


def hit(live: dict[str, Stage], roots: Roots, *cells: tuple[int, int]) -> dict[str, Stage]:
    """What is left of the stages after deletions from these cells."""
    gone = tainted(live.values(), {CellRoot(shard, piece, roots[shard][piece]) for shard, piece in cells})
    return {key: stage for key, stage in live.items() if key not in gone}


def assembly(recipe: Recipe, live: dict[str, Stage], roots: Roots) -> Assembly:
    return assemble(recipe, live, dict.fromkeys(live, "a" * 64), roots)


def test_10_every_module_is_imported_and_none_is_a_copy() -> None:
    """10: deletion.py stops at import with a NameError, and lay there twice, byte for byte."""
    folder = Path(shards.__file__).parent
    names = [module.name for module in pkgutil.walk_packages([str(folder)], "shards.")]
    assert "shards.engine.s3t" in names
    for name in names:
        importlib.import_module(name)
    sources = [path.read_bytes() for name in ("shards", "service", "workers") for path in (ROOT / name).rglob("*.py")]
    assert max(Counter(source for source in sources if source.strip()).values()) == 1


@pytest.mark.parametrize(("slices", "orders"), [(4, 1), (4, 2), (4, 6)])
def test_11_a_hit_costs_the_slices_behind_it_alone(slices: int, orders: int) -> None:
    """11: one count of deletions let any hit kill its whole shard, which put SISA far below its due."""
    recipe, roots, live = grid(3, slices, orders)
    for piece in range(slices):
        left = max(order.index(piece) for order in recipe.slice_orders)
        assert assembly(recipe, hit(live, roots, (1, piece)), roots).depths == (slices, left, slices)
    numbers = random.Random(orders)
    found: list[int] = []
    for _ in range(150):
        rest, count = live, 0
        while rest:
            rest, count = hit(rest, roots, (numbers.randrange(3), numbers.randrange(slices))), count + 1
        found.append(count)
    assert abs(np.mean(found) - all_dead_uniform(3, slices, orders)) < 3 * np.std(found) / 150**0.5


@pytest.mark.parametrize(("slices", "orders"), [(3, 4), (3, 6), (4, 5), (4, 24)])
def test_12_and_13_more_orders_than_slices_are_neither_capped_nor_all_there_are(slices: int, orders: int) -> None:
    """12: budgets above L were cut to L in silence. 13: inference took all L! sequences instead."""
    recipe, roots, live = grid(1, slices, orders)
    whole = [stage.prefix for stage in live.values() if stage.depth == slices]
    assert len(whole) == len(set(whole)) == orders
    assert whole == list(recipe.slice_orders)
    prefixes = {order[:depth] for order in whole for depth in range(1, slices + 1)}
    assert {stage.prefix for stage in live.values()} == prefixes
    for survivor in recipe.slice_orders:
        only = {key: stage for key, stage in live.items() if stage.prefix == survivor[: stage.depth]}
        (member,) = assembly(recipe, only, roots).members
        assert member is not None
        assert member.prefix == survivor
    with pytest.raises(RecipeError, match=rf"no more than {math.factorial(slices)} distinct orders"):
        grid(1, slices, math.factorial(slices) + 1)


def test_14_what_is_written_is_read_under_the_name_it_was_given(tmp_path: Path) -> None:
    """14: the mode stood inside the path, so that results went to ".../0.json/w" and were lost at the end."""
    store = open_local(tmp_path / "artifacts")
    for name in ("stages/w/0.json", "stages/r/0.json", "stages/wb"):
        with pytest.raises(ArtifactMissingError):
            store.get(name)
        store.put(name, name.encode())
    names = open_local(tmp_path / "artifacts").names(older_than=-60)
    assert names == ["stages/r/0.json", "stages/w/0.json", "stages/wb"]
    assert [store.get(name) for name in ("stages/w/0.json", "stages/wb")] == [b"stages/w/0.json", b"stages/wb"]


@pytest.mark.parametrize("kind", ["s3t", "sisa", "ridge", "module"])
def test_15_what_a_class_means_in_training_it_means_in_serving(backbone: Backbone, kind: str) -> None:
    """15: training and inference named files and labels each by a default of their own."""
    classes = ("zebra", "ape", "moose")  # neither sorted nor in the order of their records
    many: dict[str, Any] = {"classes": classes, "shards": 1, "slices": 1, "orders": 1, "epochs": 8}
    many |= {"learning_rate": 0.02, "head_learning_rate": 0.05}
    for place, label in enumerate(classes):
        if kind == "module":
            make = vector_record
            arguments = {"outputs": 3}
            recipe = module_recipe(**many)
            recipe = dataclasses.replace(recipe, module=dataclasses.replace(recipe.module, arguments=arguments))  # type: ignore[type-var]
        else:
            make, recipe = tiny_record, tiny_recipe(backbone, **many, engine=kind)
        records = [make(f"{label}{number}", label=label) for number in range(8)]
        world = World(open_trainer(recipe), {(0, 0): records})
        world.rebuild()
        assert (served(world, inputs_of(recipe, records)).argmax(axis=1) == place).all()


def test_16_eleven_is_not_one_and_one() -> None:
    """16: orders were strings of digits, ambiguous from L = 11 on; and five shards were written into the loop."""
    roots = dict.fromkeys(range(13), "same")
    recipe = tiny_recipe(Backbone(source="", digest="d" * 64), slices=13, orders=1)
    prefixes = [prefix for depth in (1, 2, 3) for prefix in itertools.permutations(range(13), depth)]
    stages = [chain(recipe.digest, 0, prefix, roots)[-1] for prefix in prefixes]
    bare = {dataclasses.replace(stage, roots=(), parent=None).key for stage in stages}
    assert len({stage_seed(recipe, 0, prefix) for prefix in prefixes}) == len(bare) == len(prefixes)
    for piece in range(13):
        hit_ = tainted(stages, {CellRoot(0, piece, "same")})
        assert hit_ == {stage.key for stage in stages if piece in stage.prefix}


def test_16_every_shard_counts_however_many_there_are() -> None:
    recipe, roots, live = grid(11, 2, 1)
    for shard in range(11):
        depths = assembly(recipe, hit(live, roots, (shard, 0)), roots).depths
        assert depths == tuple(0 if each == shard else 2 for each in range(11))


def options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    """Options of every command of the command line."""
    yield path, {"--help", *itertools.chain.from_iterable((*p.opts, *p.secondary_opts) for p in command.params)}
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, (*path, name))


def test_17_options_and_variables_in_scripts_and_pages_exist() -> None:
    """17: the scripts passed options that no parser knew, and used variables that nobody had set."""
    known = dict(options(typer.main.get_command(app)))
    seen = 0
    for page in (page for page in PAGES if page.name not in AHEAD):
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?:`|^|/)expunge ([a-z][^`\n|;&]*)", text, re.MULTILINE):
            words = line.split()
            path = next((tuple(words[:count]) for count in (2, 1) if tuple(words[:count]) in known), None)
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line) if path else ():
                assert option in known[path], f"{page.name}: expunge {line}"  # type: ignore[index]
                seen += 1
    assert seen > 3
    verbs = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()
    dry = ["/usr/bin/env", "make", "--dry-run", "--warn-undefined-variables", "ONLY=", *verbs]
    run = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "undefined variable" not in run.stderr


def test_18_a_shard_is_no_slice_and_every_shard_is_trained(backbone: Backbone) -> None:
    """18: what was called a shard's number was the slice's; the scripts trained one shard."""
    recipe, roots, live = grid(3, 2, 2)
    assert Counter(stage.shard for stage in live.values()) == {0: 4, 1: 4, 2: 4}
    for stage in live.values():
        assert {root.shard for root in stage.lineage} == {stage.shard}
        assert all(root.root == roots[stage.shard][root.slice] for root in stage.lineage)
    assert len({stage_seed(recipe, stage.shard, stage.prefix) for stage in live.values()}) == len(live)
    for kind in ("s3t", "sisa"):
        engine = open_trainer(tiny_recipe(backbone, engine=kind, orders=1))
        begun = [decode(train_chain(engine, {0: []}, (0,), shard=shard)[0]).tensors for shard in (0, 1)]
        assert any(not torch.equal(tensor, begun[1][name]) for name, tensor in begun[0].items())


def test_19_deleting_changes_nothing_in_place_and_once_is_enough(backbone: Backbone) -> None:
    """19: `delete` cut the caller's lists short, and hits on what was already dead counted as deletions."""
    recipe, roots, live = grid(2, 3, 3)
    kept = dict(live)
    before = assembly(recipe, live, roots)
    once = hit(live, roots, (0, 1))
    assert (live, assembly(recipe, live, roots)) == (kept, before)
    assert hit(once, roots, (0, 1)) == once
    world = World(
        open_trainer(tiny_recipe(backbone)), {(s, p): tiny_records(4, f"{s}{p}") for s in (0, 1) for p in (0, 1)}
    )
    world.rebuild()
    gone = {tiny_record("010").record_id}
    world.delete(gone)
    after = world.assembly()
    world.delete(gone)
    assert world.assembly() == after
    world.rebuild()
    whole = world.assembly()
    world.delete(gone)
    assert world.assembly() == whole
