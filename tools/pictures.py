"""Draws docs/pictures/stages.png and depth.png: what a deletion leaves, by the planner's own code. `make pictures`."""
# ruff: noqa: INP001 - a script

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from shards import plan  # noqa: E402
from shards.recipe import Backbone, Recipe  # noqa: E402
from shards.stages import CellRoot, Stage  # noqa: E402

OUT = ROOT / "docs" / "pictures"
SERVED, CLEAN, TAINTED, TRUNK = "#0072b2", "#9ecae1", "#d55e00", "#d9d9d9"
"""Okabe and Ito's colours: told apart by colour-blind readers, too."""
HISTORIES = 4000


def _recipe(orders: int, slices: int = 4) -> Recipe:
    backbone = Backbone(source="any", digest="0" * 64)
    return Recipe(backbone=backbone, classes=("no", "yes"), shards=1, slices=slices, orders=orders)


def _roots(recipe: Recipe, hit: frozenset[int] = frozenset()) -> dict[int, dict[int, str]]:
    return {0: {index: f"{index}{'*' if index in hit else ''}" for index in range(recipe.slices)}}


def _live(recipe: Recipe, hit: frozenset[int]) -> tuple[dict[str, Stage], dict[str, Stage], int]:
    """All stages, those that a hit on these slices leaves, and the depth that then serves."""
    stages = {stage.key: stage for stage in plan.missing(recipe, _roots(recipe), frozenset())}
    gone = plan.tainted(stages.values(), {CellRoot(0, index, str(index)) for index in hit})
    clean = {key: stage for key, stage in stages.items() if key not in gone}
    served = plan.assemble(recipe, clean, dict.fromkeys(clean, "0" * 64), _roots(recipe, hit))
    return stages, clean, served.depths[0]


def draw_stages(path: Path) -> None:
    """One shard with two orders of four slices, before and after a deletion from slice 0."""
    recipe = _recipe(orders=2)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axis, hit, title in (
        (axes[0], frozenset[int](), "before: depth 4 serves"),
        (axes[1], frozenset({0}), "after a deletion from slice 0: depth {depth} serves"),
    ):
        stages, clean, depth = _live(recipe, hit)
        roots = _roots(recipe, hit)
        live = plan.assemble(recipe, clean, dict.fromkeys(clean, "0" * 64), roots).members[0]
        for column, order in enumerate(recipe.slice_orders):
            for stage in stages.values():
                if stage.prefix == order[: stage.depth]:
                    serves = live is not None and stage.prefix == live.prefix[: stage.depth]
                    _block(axis, column, stage, SERVED if serves else CLEAN if stage.key in clean else TAINTED)
            axis.add_patch(Rectangle((column * 1.3, -1.35), 1.1, 1.2, color=TRUNK))
            axis.text(column * 1.3 + 0.55, -0.75, "trunk (frozen)", ha="center", va="center", fontsize=9)
            axis.text(column * 1.3 + 0.55, 4.25, f"order {'-'.join(map(str, order))}", ha="center", fontsize=10)
        axis.set_title(title.format(depth=depth), pad=16)
        axis.set_xlim(-0.1, 2.5)
        axis.set_ylim(-1.5, 4.6)
        axis.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in (SERVED, CLEAN, TAINTED)]
    figure.legend(handles, ["serves", "clean, in reserve", "tainted: out of service"], loc="lower center", ncol=3)
    figure.subplots_adjust(bottom=0.12, top=0.86, wspace=0.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _block(axis: Axes, column: int, stage: Stage, colour: str) -> None:
    """Stage i is the block i from the top, trained on the first i slices of the order."""
    bottom = 4 - stage.depth
    axis.add_patch(Rectangle((column * 1.3, bottom + 0.04), 1.1, 0.92, color=colour))
    axis.text(
        column * 1.3 + 0.55,
        bottom + 0.5,
        f"stage {stage.depth}: slices {', '.join(map(str, stage.prefix))}",
        ha="center",
        va="center",
        fontsize=9,
        color="white" if colour != CLEAN else "black",
    )


def draw_depth(path: Path) -> None:
    """Mean depth that serves after each deletion from random slices, without any rebuild, by number of orders."""
    random = np.random.default_rng(0)
    slices, requests = 4, 16
    hits = random.integers(0, slices, (HISTORIES, requests))
    figure, axis = plt.subplots(figsize=(7, 4))
    for orders, style in ((1, "o-"), (2, "s-"), (4, "^-"), (24, "d-")):
        recipe = _recipe(orders)
        depth_of = {frozenset(hit): _live(recipe, frozenset(hit))[2] for hit in _subsets(slices)}
        depths = [[depth_of[frozenset(history[: done + 1].tolist())] for done in range(requests)] for history in hits]
        label = "1 order (SISA)" if orders == 1 else f"{orders} orders"
        axis.plot(range(1, requests + 1), np.mean(depths, axis=0), style, label=label, markersize=4)
    axis.set_xlabel("deletions from one shard of 4 slices, none rebuilt")
    axis.set_ylabel("mean served depth")
    axis.set_ylim(0, slices)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _subsets(size: int) -> list[list[int]]:
    return [[index for index in range(size) if mask >> index & 1] for mask in range(2**size)]


if __name__ == "__main__":
    mpl.use("Agg")
    OUT.mkdir(exist_ok=True)
    draw_stages(OUT / "stages.png")
    draw_depth(OUT / "depth.png")
