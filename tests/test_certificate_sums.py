"""A certificate over an assembly of engine ridge: seats are cells, each at most once and in their order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from certificate_ledger import with_ledger
from certificate_sample import KEY, PEM, RECIPE, artifact_digest, manifest, resigned, sample

from service.evidence.certificate import issue
from service.evidence.rows import Evidence
from service.evidence.verify import verify
from shards.assembly import Assembly, Member
from shards.stages import Stage, chain


def cell(shard: int, part: int, **more: Any) -> Stage:
    return chain(RECIPE, shard, (part,), {part: manifest(shard, part, **more)})[0]


def summed() -> Evidence:
    """The deleted record's cell is out, the five others serve."""
    erased = sample()
    served = [cell(shard, part) for shard in range(2) for part in range(3) if (shard, part) != (0, 1)]
    members: list[Member | None] = [Member(each.key, each.prefix, (artifact_digest(each),)) for each in served]
    members.insert(1, None)
    tainted = (cell(0, 1, deleted=True, generation=2),)
    objects = (
        dataclasses.replace(
            erased.tainted_objects[0],
            object_name=f"stages/{tainted[0].key}/{artifact_digest(tainted[0])}/0",
            digest=artifact_digest(tainted[0]),
            stage_key=tainted[0].key,
        ),
    )
    made = dataclasses.replace(
        erased,
        engine="ridge",
        platforms=(dataclasses.replace(erased.platforms[0], stages=tuple(each.key for each in served)),),
        replays=(),
        assembly_after=Assembly(RECIPE, tuple(members), "sums").to_json(),
        served_stages=tuple(served),
        tainted_stages=tainted,
        tainted_objects=objects,
    )
    return with_ledger(made)


def test_it_verifies() -> None:
    assert [check for check in verify(issue(summed(), KEY), PEM) if not check.passed] == []


def _twice(members: list[Any]) -> None:
    members[1] = members[0]


def _swapped(members: list[Any]) -> None:
    members[3], members[4] = members[4], members[3]


def _deeper(members: list[Any]) -> None:
    members[0]["artifacts"] *= 2


@pytest.mark.parametrize("tamper", [_twice, _swapped, _deeper])
def test_a_cell_counts_once_and_in_its_place(tamper: Callable[[list[Any]], None]) -> None:
    envelope = resigned(lambda body: tamper(body["predicate"]["after"]["assembly"]["members"]), summed())
    wrong = [check for check in verify(envelope, PEM) if not check.passed]
    assert any("is not a cell of its own" in check.detail for check in wrong), wrong
