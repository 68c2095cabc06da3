"""Pictures as PNG files. Colours are Okabe and Ito's, told apart by colour-blind people too; lines differ in dash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from shards.scenario import Curve

COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7F7F7F", "#8C5A2B")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)), "-", "--")
INK, FAINT = "#222222", "#DDDDDD"


@dataclass(frozen=True, slots=True)
class Point:
    """One choice of a frontier."""

    label: str
    work: float
    depth: float
    least: float
    group: str


def draw_curves(curves: Sequence[Curve], title: str, out: Path) -> None:
    """Served depth and cumulative work over the days, one above the other, one line a strategy.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for those who want a picture

    figure = Figure(figsize=(10, 9.5), layout="constrained")
    depth, work = figure.subplots(2, 1, sharex=True)
    days = range(1, len(curves[0].depth) + 1)
    for place, curve in enumerate(curves):
        style: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": DASHES[place % len(DASHES)],
            "linewidth": 5 - 3.4 * place / len(curves),  # what coincides shows at the sides of what lies on it
            "label": curve.name,
        }
        depth.plot(days, [100 * each for each in curve.depth], **style)
        work.plot([0, *days], [0, *curve.work], **style)
    _axes(depth, "Served depth (% of slices)", "Served depth at the end of each day, before that night's rebuild")
    depth.set_ylim(-3, 103)
    most = max(curve.work[-1] for curve in curves)
    _axes(work, "Work (full retrains)", "Cumulative training work, in trainings of the whole grid from nothing")
    if most > 4:  # else the cheap policies would lie on the axis
        work.set_ylabel("Work (full retrains; logarithmic above 1)", color=INK)
        work.set_yscale("symlog", linthresh=1, linscale=0.8)
        ticks = [0, 0.5, *[each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if each < most * 1.3]]
        work.set_yticks(ticks, [f"{each:g}" for each in ticks])
        work.set_yticks([], minor=True)
    work.set_ylim(-0.03, most * 1.15 or 1)
    work.set_xlim(0, len(curves[0].depth))
    work.set_xlabel("Day", color=INK)
    handles, labels = depth.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10, handlelength=3.6)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.savefig(out, dpi=110, format="png")


def draw_shards(body: dict[str, Any], out: Path) -> None:
    """What each shard serves and how many more deletions it stands, from the API's answer.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for those who want a picture

    shards = body["shards"]
    names = [each["shard"] for each in shards]
    figure = Figure(figsize=(10, 7), layout="constrained")
    depth, lasts = figure.subplots(2, 1, sharex=True)
    slices = max(each["slices"] for each in shards)
    depth.bar(names, [slices] * len(names), color=FAINT, width=0.8, label="lost")
    depth.bar(names, [each["depth"] for each in shards], color=COLOURS[2], width=0.8, label="served")
    _axes(depth, "Slices", f"Served depth of {body['model']}, version {body['version']}")
    depth.set_ylim(0, slices * 1.02)
    for field, name, colour, mark in (
        ("until_dead", "until it is dead", COLOURS[0], "s"),
        ("until_loss", "until its next loss of depth", COLOURS[1], "o"),
    ):
        known = [(each["shard"], each[field]) for each in shards if each[field] is not None]
        if known:
            lasts.plot(*zip(*known, strict=True), mark, color=colour, label=name, markersize=9 if mark == "s" else 6)
    _axes(lasts, "Deletions (of the model)", "Expected further deletions that each shard stands without a rebuild")
    lasts.set_ylim(bottom=0)
    lasts.set_xlabel("Shard", color=INK)
    for axis in (lasts.xaxis, depth.yaxis):
        axis.get_major_locator().set_params(integer=True)
    for axes in (depth, lasts):
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(out, dpi=110, format="png")


def draw_frontier(points: Sequence[Point], title: str, limit: float, out: Path) -> None:
    """Work of a deletion over SISA's against the depth that the hit shard serves meanwhile; `limit` is the target.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for those who want a picture

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    for place, group in enumerate(dict.fromkeys(each.group for each in points)):
        own = sorted((each for each in points if each.group == group), key=lambda each: each.work)
        colour, mark = COLOURS[(2, 3, 4, 0, 1)[place % 5]], "osD^v"[place % 5]
        works = [each.work for each in own]
        axes.plot(
            works, [100 * each.depth for each in own], mark, color=colour, markersize=9, linestyle="-", label=group
        )
        axes.plot(works, [100 * each.least for each in own], mark, color=colour, markersize=8, fillstyle="none")
        for each in own:
            axes.annotate(
                each.label, (each.work, 100 * each.depth), (0, 9), textcoords="offset points", ha="center", fontsize=9
            )
    axes.axvline(limit, color=COLOURS[7], linestyle=":", linewidth=1.5)
    axes.annotate(f"target {limit:g}", (limit, 1), (4, 2), textcoords="offset points", color=COLOURS[7])
    _axes(axes, "Depth that the hit shard serves until it is rebuilt (%)", title)
    axes.set_xlabel("Training work of one deletion, SISA with full fine-tuning = 1", color=INK)
    axes.set_ylim(-4, 104)
    axes.set_xlim(left=0)
    axes.legend(loc="upper left", frameon=False, title="filled: mean, hollow: least", alignment="left")
    figure.savefig(out, dpi=110, format="png")


def _axes(axes: Axes, label: str, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_ylabel(label, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
