"""Training in a process of its own, which can be killed at a chosen moment; what it finished is in files."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from exact import Slices, stages_of

from shards.engine.determinism import prepare
from shards.engine.registry import open_trainer
from shards.recipe import Recipe


def train_into(
    directory: Path, recipe: Mapping[str, Any], slices: Slices, prefixes: list[tuple[int, ...]], kill: str = ""
) -> None:
    """Train the chains of shard 0 that are not in `directory` yet, resuming from what is there.

    `kill` is where the process dies: "train 3" at the first progress of the third stage trained here, "write 3" with
    its file half written, "done 3" as soon as it is there.
    """
    torch.set_num_threads(2)
    prepare()
    assert torch.get_num_threads() == 1
    engine = open_trainer(Recipe.from_json(recipe))
    moment, _, number = kill.partition(" ")
    trained = 0

    def reach(where: str) -> None:
        if moment == where and trained == int(number):
            os.kill(os.getpid(), signal.SIGKILL)

    for order in prefixes:
        artifacts: list[bytes] = []
        for stage in stages_of(engine, slices, order):
            path = directory / "-".join(map(str, stage.prefix))
            if not path.exists():
                trained += 1
                records = [record for piece in stage.prefix for record in slices[piece]]
                data = engine.train(stage, records, artifacts, lambda _done, _total: reach("train"))
                aside = path.with_suffix(".part")
                aside.write_bytes(data)
                reach("write")
                aside.rename(path)
                reach("done")
            artifacts.append(path.read_bytes())
