"""A pytest plugin with the fixture `installation`: a small one, of its own, whose stores are put back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Server
from restore_kit import Installation
from world_copies import Copy


@pytest.fixture
def installation(world: Copy, postgres: Server, tmp_path: Path) -> Iterator[Installation]:
    found = Installation(world, postgres, tmp_path)
    yield found
    for name in found.copies:
        postgres.drop(name)
