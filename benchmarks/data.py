"""The demo's encoder, reviews and recipe, for measurements that need no database."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import NAMESPACE_OID, uuid5

from service.cli.demo import sample as samples
from service.cli.demo.assets import cache_directory, fetch
from service.cli.demo.command import recipe as demo_recipe
from service.cli.demo.sample import Review, Sample
from shards.manifest import Manifest, Record
from shards.partition import cell_of, dataset_key
from shards.recipe import Recipe
from shards.stages import Stage, chain

Slices = Mapping[int, Sequence[Record]]
"""Records by slice."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard's records, as every process needs them to plan and train its stages."""

    number: int
    slices: Slices

    def chain(self, recipe: Recipe, order: Sequence[int]) -> tuple[Stage, ...]:
        """The stages of one order on these records, shortest first."""
        roots = {number: Manifest.of(r.commitment for r in records).root for number, records in self.slices.items()}
        return chain(recipe.digest, self.number, order, roots)

    def read_by(self, stage: Stage) -> list[Record]:
        """The records that a stage is trained on."""
        return [record for number in stage.prefix for record in self.slices[number]]


def draw(training: int, held_out: int = 0) -> Sample:
    """The demo's sample of the given sizes."""
    return samples.draw(samples.read(fetch(cache_directory(), print).reviews), training=training, held_out=held_out)


def encoder() -> str:
    """Directory of the encoder's files."""
    return str(fetch(cache_directory(), print).encoder)


def recipe(**changes: Any) -> Recipe:
    """The demo's recipe, with other values for some of its fields."""
    return replace(Recipe.from_json(demo_recipe(fetch(cache_directory(), print).encoder)), **changes)


def record(review: Review) -> Record:
    """A review as the engine takes it. The empty salt would commit to nothing secret; nothing here is published."""
    return Record(uuid5(NAMESPACE_OID, review.record_id), b"", review.text, review.label)


def partition(reviews: Sequence[Review], *, shards: int, slices: int, seed: int) -> list[Shard]:
    """Reviews by the cell of their reviewer, under a partition key made from the seed."""
    key = dataset_key(seed.to_bytes(32, "big"), uuid5(NAMESPACE_OID, "benchmarks"))
    grid: list[dict[int, list[Record]]] = [{number: [] for number in range(slices)} for _ in range(shards)]
    for review in reviews:
        cell = cell_of(key, uuid5(NAMESPACE_OID, review.reviewer), shards=shards, slices=slices)
        grid[cell.shard][cell.slice].append(record(review))
    return [Shard(number, cells) for number, cells in enumerate(grid)]
