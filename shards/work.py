"""What training costs, in passes of one record through one layer.

Forward counts 1, the gradient of the activations 1, the gradient of the weights 1 (design.md, section 9).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from shards.recipe import Recipe

Prefix = tuple[int, ...]


def stage_work(recipe: Recipe, prefix: Prefix, rows: Mapping[int, float], layers: int | None = None) -> float:
    """Passes of one record through one layer that training one stage takes, its parent being there.

    - `s3t`: the stage of depth i runs the i blocks from the top, forward and activations' gradient, and the weights'
      gradient of its own block alone. The hidden state below is cached at every boundary (`stage_features`).
    - `sisa`: forward and both gradients of every layer, for as many epochs as SISA's rule gives a stage.
    - `ridge`: one forward pass. `external`: as a full training of every layer.

    Args:
        recipe: the model's.
        prefix: slices the stage reads.
        rows: records by slice of the stage's shard.
        layers: layers of the backbone; where unknown, a pass through the whole model counts 1.
    """
    records = sum(rows.get(index, 0) for index in prefix)
    whole = layers or 1
    if recipe.engine == "s3t":
        depth = len(prefix)
        return recipe.epochs * records * recipe.layers_per_slice * (2 * depth + 1)
    if recipe.engine == "ridge":
        return records * whole
    if recipe.engine == "sisa":
        return sisa_work(records, recipe.slices, recipe.epochs, whole)
    return recipe.epochs * records * 3 * whole


def sisa_work(records: float, slices: int, epochs: float, layers: int) -> float:
    """Passes that one stage of SISA with full fine-tuning takes: forward and both gradients of every layer.

    SISA spreads e' epochs over its R stages: 2e'/(R+1) each, so that they cost together what e' epochs of plain
    training do (facts/exact-unlearning.md, section 2).

    Args:
        records: that the stage reads.
        slices: R.
        epochs: e'.
        layers: of the backbone.
    """
    return 2 * epochs / (slices + 1) * records * 3 * layers


def stage_features(recipe: Recipe, prefix: Prefix, rows: Mapping[int, float], layers: int) -> float:
    """Passes that an `s3t` stage takes once more where the hidden states below its block are not cached."""
    below = max(0, layers - len(prefix) * recipe.layers_per_slice)
    return below * sum(rows.get(index, 0) for index in prefix)


@dataclass(frozen=True, slots=True)
class StageCost:
    """Work of one stage of a shard, by its prefix."""

    recipe: Recipe
    rows: Mapping[int, float]
    """Records by slice."""
    layers: int | None = None

    def __call__(self, prefix: Prefix) -> float:
        """As `stage_work`."""
        return stage_work(self.recipe, prefix, self.rows, self.layers)


def shard_costs(
    recipe: Recipe, rows: Mapping[tuple[int, int], float], layers: int | None = None
) -> dict[int, StageCost]:
    """The cost of a stage by shard, given the records by (shard, slice)."""
    by_shard: dict[int, dict[int, float]] = {}
    for (shard, index), records in rows.items():
        by_shard.setdefault(shard, {})[index] = records
    return {shard: StageCost(recipe, found, layers) for shard, found in by_shard.items()}
