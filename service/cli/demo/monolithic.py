"""One model trained on everything, for comparison: a process of its own, and nothing of it reaches the disk.

`python -m service.cli.demo.monolithic` reads one JSON object from standard input (`recipe`, `training`, `held_out`)
and writes JSON lines: `{"done": .., "total": ..}` while it trains, `{"accuracy": ..}` at the end.
"""

import json
import sys
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from shards.engine import determinism
from shards.engine.backbone import Backbone
from shards.engine.ensemble import Monolithic, StageTensors
from shards.engine.s3t import S3T
from shards.engine.skeleton import Skeleton
from shards.manifest import Record
from shards.recipe import Recipe


def main() -> None:
    """Train, measure, say so."""
    determinism.prepare()
    given: dict[str, Any] = json.load(sys.stdin)
    recipe = Recipe.from_json(given["recipe"])
    backbone = Backbone.load(recipe)
    trained = S3T(recipe, backbone).train_whole([_record(line) for line in given["training"]], _progress)
    model = Monolithic(Skeleton(recipe, backbone), StageTensors(recipe), trained)
    held_out = given["held_out"]
    answers = model.logits([line["text"] for line in held_out]).argmax(axis=1)
    right = sum(recipe.classes[int(answer)] == line["label"] for answer, line in zip(answers, held_out, strict=True))
    _say({"accuracy": right / len(held_out)})


def _record(line: dict[str, str]) -> Record:
    return Record(uuid5(NAMESPACE_OID, line["record_id"]), b"", line["text"], line["label"])


def _progress(done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        _say({"done": done, "total": total})


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
