"""Exact sums of a least-squares fit: records as integers, their products added up without a single rounding.

Integer sums do not depend on the order in which they were added, so a record taken out again leaves the very bits of
one that was never there (facts/exact-unlearning.md, section 3). Floating-point sums would not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from shards.errors import RecipeError, ShardsError
from shards.recipe import Recipe, Ridge

Features = npt.NDArray[np.int32]
"""(records, d): a record's features on the grid, the last column being the constant for the bias."""
Targets = npt.NDArray[np.int32]
"""(records, outputs): one-hot classes, or a regression's target on the grid."""
FLOAT_EXACT = 2**53
"""Below it every integer is a float64, so that a product of float64 matrices is exact, whatever its order."""
INTEGER_EXACT = 2**63
TARGET_BITS = 12
TARGET_CLIP = 16.0
"""A regression's targets lie on the grid of 2^-12 of the declared spread and are cut 16 spreads from its offset."""
BLOCK = 2048
"""Most rows that are multiplied at once; bounds the memory of their float64 copy."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How records become integers, and sums become weights: all of it declared, nothing of it taken from data."""

    bits: int
    """Features lie on the grid of 2^-bits."""
    clip: float
    """They are cut to [-clip, clip]."""
    penalty: float
    """Lambda in units of squared features; not for the bias, so that the targets' mean is not shrunk."""
    target_bits: int
    """Of a regression's targets, `TARGET_BITS`; 0 for classes, which are counted."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The grid that a recipe of engine `ridge` declares."""
        own = recipe.ridge or Ridge()
        return cls(own.bits, own.clip, own.penalty, TARGET_BITS if recipe.task == "regression" else 0)

    @property
    def limit(self) -> int:
        """Largest magnitude of a feature or target on the grid, the constant's included."""
        features = max(round(self.clip * 2**self.bits), 2**self.bits)
        return max(features, int(TARGET_CLIP * 2**self.target_bits)) if self.target_bits else features

    def check(self, records: int) -> None:
        """Refuse sums that could overflow; called before any is computed.

        Raises:
            RecipeError: records * limit^2 is 2^63 or more.
        """
        if records * self.limit**2 >= INTEGER_EXACT:
            raise RecipeError(
                f"ridge: sums over {records} records with clip {self.clip:g} and {self.bits} bits may overflow 63 "
                "bits: lower ridge.bits or ridge.clip, or make smaller cells by raising shards or slices"
            )

    def check_penalty(self, records: int, width: int) -> None:
        """Refuse a penalty that the rounding of a solve over `width` features could drown.

        Raises:
            RecipeError: it is below 16 * width * 2^-52 * records * clip^2, the bound of that rounding with some margin.
        """
        least = 2.0**-48 * width * records * max(self.clip, 1.0) ** 2
        if self.penalty < least:
            raise RecipeError(
                f"ridge.penalty of {self.penalty:g} is lost in the rounding of a solve over {records} records: raise "
                f"it to {least:.2g} or more, or lower ridge.clip"
            )

    def features(self, pools: npt.NDArray[np.float32]) -> Features:
        """Pools (records, d-1) cut and rounded to the grid, half to even, with the constant 1 as last column.

        Raises:
            ShardsError: a pool is not finite.
        """
        if not np.isfinite(pools).all():
            raise ShardsError(
                "the backbone gave features that are not finite: set precision to float32, or use another backbone"
            )
        cut = np.clip(pools.astype(np.float64), -self.clip, self.clip)
        found = np.full((pools.shape[0], pools.shape[1] + 1), 2**self.bits, np.int32)
        found[:, :-1] = np.rint(cut * 2**self.bits)
        return found

    def values(self, numbers: Sequence[float]) -> Targets:
        """A regression's targets (records, 1), given in spreads, cut and rounded to their grid.

        Raises:
            ShardsError: a target is not finite.
        """
        given = np.asarray(numbers, np.float64).reshape(-1, 1)
        if not np.isfinite(given).all():
            raise ShardsError("a record's target is not a finite number: correct its label, or delete the record")
        return np.rint(np.clip(given, -TARGET_CLIP, TARGET_CLIP) * 2**self.target_bits).astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        """The fields; `Grid(**body)` reads them."""
        return {"bits": self.bits, "clip": self.clip, "penalty": self.penalty, "target_bits": self.target_bits}


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """What a least-squares fit needs of records, in integers: exact, and free of their order."""

    count: int
    """Records in the sums."""
    xtx: npt.NDArray[np.int64]
    """Upper triangle of the features' products (d, d), row by row: d (d + 1) / 2 numbers."""
    xty: npt.NDArray[np.int64]
    """Products of features and targets, (d, outputs)."""

    def add(self, other: "Sums", grid: Grid) -> "Sums":
        """The sums over the records of both.

        Raises:
            RecipeError: they may overflow, see `Grid.check`.
            ShardsError: they have other shapes.
        """
        self._match(other)
        grid.check(self.count + other.count)
        return Sums(self.count + other.count, self.xtx + other.xtx, self.xty + other.xty)

    def subtract(self, other: "Sums") -> "Sums":
        """The sums without the records of `other`, which must be among them: as if these had never been added.

        Raises:
            ShardsError: other shapes, or records that cannot be among these.
        """
        self._match(other)
        left = Sums(self.count - other.count, self.xtx - other.xtx, self.xty - other.xty)
        squares = left.xtx[_diagonal(len(left.xty))]
        if left.count < 0 or (squares < 0).any() or (left.count == 0 and (left.xtx.any() or left.xty.any())):
            raise ShardsError("the records to subtract are not among the summed ones: train the cell again instead")
        return left

    def same(self, other: "Sums") -> bool:
        """Whether both are equal, bit for bit."""
        return self.count == other.count and np.array_equal(self.xtx, other.xtx) and np.array_equal(self.xty, other.xty)

    def _match(self, other: "Sums") -> None:
        if self.xty.shape != other.xty.shape or self.xtx.shape != other.xtx.shape:
            raise ShardsError(
                f"sums of {other.xty.shape} features and outputs do not go with those of {self.xty.shape}: "
                "all must come from one recipe"
            )


def sums_of(grid: Grid, features: Features, targets: Targets) -> Sums:
    """Sums over records of `grid`'s features and targets: exact, computed as float64 products where these are.

    Raises:
        RecipeError: they may overflow, see `Grid.check`.
        ShardsError: numbers beyond the grid's limit, or not as many targets as features.
    """
    grid.check(len(features))
    if len(features) != len(targets):
        raise ShardsError(f"{len(features)} records have features, {len(targets)} have targets: give both of each")
    for integers in (features, targets):
        if integers.size and max(-int(integers.min()), int(integers.max())) > grid.limit:
            raise ShardsError(f"features beyond the grid's limit of {grid.limit}: make them with Grid.features")
    wide, outputs = features.shape[1], targets.shape[1]
    xtx, xty = np.zeros(wide * (wide + 1) // 2, np.int64), np.zeros((wide, outputs), np.int64)
    # Of rows so few that the largest possible sum of their products is below 2^53. Where a single product is not,
    # integers are multiplied as such: slower, but the check above leaves at most 2^10 rows of them.
    rows = min(BLOCK, (FLOAT_EXACT - 1) // grid.limit**2)
    kind = np.float64 if rows else np.int64
    for at in range(0, len(features), rows or BLOCK):
        x = features[at : at + (rows or BLOCK)].astype(kind)
        y = targets[at : at + (rows or BLOCK)].astype(kind)
        xtx += pack(x.T @ x)
        xty += (x.T @ y).astype(np.int64, copy=False)
    return Sums(len(features), xtx, xty)


def nothing(grid: Grid, width: int, outputs: int) -> Sums:
    """Sums over no record, of `width` features with the constant."""
    return sums_of(grid, np.zeros((0, width), np.int32), np.zeros((0, outputs), np.int32))


def total(grid: Grid, parts: Iterable[Sums]) -> Sums:
    """Sums over the records of all parts, of which there must be one; their order does not show.

    Raises:
        RecipeError: they may overflow, see `Grid.check`.
        ShardsError: there are none, or they have other shapes.
    """
    whole: Sums | None = None
    for part in parts:
        whole = part if whole is None else whole.add(part, grid)
    if whole is None:
        raise ShardsError("no cell has clean sums: nothing can be answered until one is rebuilt")
    return whole


def pack(square: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Upper triangle, row by row, of a symmetric matrix (d, d) of integers in any type."""
    packed = np.empty(len(square) * (len(square) + 1) // 2, np.int64)
    at = 0
    for index, row in enumerate(square):
        packed[at : at + len(row) - index] = row[index:]
        at += len(row) - index
    return packed


def _diagonal(wide: int) -> npt.NDArray[np.int64]:
    """Where the diagonal's numbers stand in a packed triangle."""
    index = np.arange(wide)
    return index * wide - index * (index - 1) // 2
