"""What the demo shows: grids of coloured blocks, progress bars, the final table."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from service.cli.demo.report import Report

Grid = Mapping[str, Any]
"""The answer of `GET /v1/models/{m}/shards`."""

SERVES, SPARE, GONE = ("■", "bold green"), ("▨", "blue"), ("□", "red")


class Screen:
    """Where everything is written."""

    def __init__(self, console: Console) -> None:
        """On a terminal bars move; in a file each finished bar leaves one line."""
        self.console = console

    def say(self, line: RenderableType = "") -> None:
        """One line."""
        self.console.print(line)

    def title(self, text: str) -> None:
        """A new part begins."""
        self.console.print()
        self.console.rule(f"[bold]{text}", align="left", style="dim")

    @contextmanager
    def bar(self, text: str, total: float | None) -> Generator[Callable[[float], None]]:
        """A progress bar; call what it gives with how much more is done."""
        count = MofNCompleteColumn() if total is not None else TextColumn("")
        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(30), count)
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda more: progress.advance(task, more)
            progress.update(task, total=total or 1, completed=total or 1)

    @contextmanager
    def bars(self, texts: Mapping[str, str]) -> Generator[Callable[[str, float, float | None], None]]:
        """Several bars; call what it gives with a bar's name, how much is done, and out of how much."""
        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(30))
        with Progress(
            *columns, TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), console=self.console
        ) as bar:
            tasks = {name: bar.add_task(text, total=None) for name, text in texts.items()}
            yield lambda name, done, total: bar.update(tasks[name], completed=done, total=total)


def grids(grids_by_title: Mapping[str, Grid]) -> RenderableType:
    """Grids side by side, with a line that says what the blocks mean."""
    legend = Text("  ").join(
        [
            Text.assemble(SERVES, " serves"),
            Text.assemble(SPARE, " trained, in reserve"),
            Text.assemble(GONE, " out of service, to be rebuilt"),
        ]
    )
    return Group(Columns([_grid(title, grid) for title, grid in grids_by_title.items()], padding=(0, 3)), legend)


def _grid(title: str, grid: Grid) -> Table:
    table = Table(title=f"{title} (version {grid['version']})", title_style="bold", title_justify="left")
    table.add_column("shard", justify="right")
    for order in grid["orders"]:
        table.add_column("→".join(map(str, order)), justify="center")
    table.add_column("depth", justify="right")
    for shard in grid["shards"]:
        orders = [_blocks(order["order"], order["depth"], shard["prefix"]) for order in shard["orders"]]
        table.add_row(str(shard["shard"]), *orders, f"{shard['depth']}/{grid['slices']}")
    return table


def _blocks(order: Sequence[int], depth: int, prefix: Sequence[int]) -> Text:
    """One block per stage of an order: those that serve, those in reserve, those that are gone."""
    serving = len(prefix) if list(order[: len(prefix)]) == list(prefix) else 0
    styles = [SERVES if at < serving else SPARE if at < depth else GONE for at in range(len(order))]
    return Text(" ").join(Text(*style) for style in styles)


def cells(grid: Grid) -> Table:
    """Rows of each cell."""
    table = Table(title="records per cell", title_style="bold", title_justify="left")
    table.add_column("shard", justify="right")
    for number in range(grid["slices"]):
        table.add_column(f"slice {number}", justify="right")
    for shard in grid["shards"]:
        table.add_row(str(shard["shard"]), *(str(cell["rows"]) for cell in shard["slices"]))
    return table


def summary(report: Report) -> Table:
    """The short table at the end."""
    table = Table(show_header=False, title="What happened", title_style="bold", title_justify="left")
    for name, value in _lines(report):
        table.add_row(name, value)
    return table


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    accuracy, versions = report.accuracy, report.versions
    yield "request received → deactivated", f"{report.deactivated_ms:.0f} ms"
    yield (
        "predictions meanwhile",
        f"{report.predictions_total}, {report.predictions_failed} failed, {report.predictions_stale} stale",
    )
    yield "versions", f"{versions.before} → {versions.deactivated} deactivated → {versions.rebuilt} rebuilt"
    yield (
        "records, stages, files",
        f"{report.records_deleted} deleted, {report.stages_tainted} tainted, {report.artifacts_destroyed} destroyed",
    )
    depths = (report.depth_before, report.depth_after_deactivation, report.depth_after_rebuild)
    yield "depth per shard", " → ".join(" ".join(map(str, depth)) for depth in depths)
    down = f"{accuracy.before:.3f} → {accuracy.deactivated:.3f} (previewed {accuracy.previewed:.3f})"
    yield "accuracy", f"{down} → {accuracy.rebuilt:.3f}"
    yield "one model on everything", f"{accuracy.monolithic:.3f}  (standard error {report.accuracy_stderr:.3f})"
    yield "certificate", "verified" if report.certificate_verified else "NOT VERIFIED"
    equal = "bit for bit the same" if report.replay_equal else "DIFFERENT"
    yield "rebuilt stage trained again", f"{equal} ({report.replayed_stage[:12]})"
    yield "time", f"{report.seconds_total:.0f} s"
