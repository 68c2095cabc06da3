"""A pytest plugin with the fixtures `trained` and `world`: an installation trained once, and a copy for each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server
from test_workers_path import build
from tiny import tiny_backbone
from world import World
from world_copies import Copy, Mould, cast, populate

from shards.recipe import Backbone


def _train(world: World) -> None:
    populate(world)
    build(world)


@pytest.fixture(scope="session")
def small_backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return tiny_backbone(tmp_path_factory.mktemp("backbone"), layers=2, width=16)


@pytest.fixture(scope="session")
def trained(
    postgres: Server, migrated_template: str, tmp_path_factory: pytest.TempPathFactory, small_backbone: Backbone
) -> Iterator[Mould]:
    with cast(postgres, migrated_template, tmp_path_factory.mktemp("mould"), small_backbone, _train) as mould:
        yield mould


@pytest.fixture
def world(trained: Mould, tmp_path: Path) -> Iterator[Copy]:
    """An installation of its own: version 1 at full depth, floor 0."""
    with trained.copy(tmp_path) as copy:
        yield copy
