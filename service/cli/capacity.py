"""`expunge capacity`: how many more deletions a model stands, and what each rebuild policy would cost."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table

if TYPE_CHECKING:
    from shards.scenario import Curve, Scenario

BAR = 24
"""Characters of a full bar."""


def capacity(
    model: Annotated[str | None, typer.Argument(help="A model; none with --simulate.")] = None,
    *,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Simulate a model that need not exist; offline.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="Deletions a day. Default: the model's last 30 days.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the backbone, which SISA trains.")] = None,
    users: Annotated[int, typer.Option(help="Users whose records are trained on.")] = 20_000_000,
    rows: Annotated[int | None, typer.Option(help="Records in all. Default: one a user.")] = None,
    shards: Annotated[int, typer.Option()] = 16,
    slices: Annotated[int, typer.Option(help="Slices a shard.")] = 4,
    orders: Annotated[int, typer.Option(help="Slice orders trained a shard.")] = 2,
    days: Annotated[int, typer.Option(help="Days to simulate.")] = 30,
    rates: Annotated[str, typer.Option(help="How often each slice is hit, as 1,1,8: a deletion prior.")] = "",
    layers_per_slice: Annotated[int, typer.Option(help="Layers in each slice's block.")] = 1,
    epochs: Annotated[int, typer.Option(help="Passes over a stage's records.")] = 3,
    full_days: Annotated[float, typer.Option(help="Days that training everything takes your machines.")] = 1.0,
    due_days: Annotated[float, typer.Option(help="Days from a deletion to its due date.")] = 30.0,
    plans_per_day: Annotated[int, typer.Option(help="How often a day the planner runs.")] = 1,
    histories: Annotated[int, typer.Option(help="Simulated histories.")] = 1000,
    seed: Annotated[int, typer.Option(help="Another one gives other histories.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write a picture (PNG) here.")] = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Show what a model can still lose; with --simulate, compare rebuild policies with SISA and full retrains."""
    if not simulate:
        if model is None:
            raise CommandError("name a model, or add --simulate to try a grid that does not exist yet")
        _show_model(model, rate, layers, out, state, as_json=as_json)
        return
    if model is not None:
        raise CommandError(
            "--simulate needs no model: leave the name out, and give --users, --rate, --shards and so on"
        )
    from shards.errors import RecipeError  # noqa: PLC0415
    from shards.scenario import Scenario  # noqa: PLC0415 - numpy, for those who simulate

    try:
        scenario = Scenario(
            users=users,
            per_day=17.0 if rate is None else rate,
            rows=users if rows is None else rows,
            shards=shards,
            slices=slices,
            orders=orders,
            days=days,
            layers=12 if layers is None else layers,
            layers_per_slice=layers_per_slice,
            epochs=epochs,
            rates=_numbers(rates),
            full_days=full_days,
            due_days=due_days,
            plans_per_day=plans_per_day,
            histories=histories,
            seed=seed,
        )
    except RecipeError as error:
        raise CommandError(f"cannot simulate this: {error}") from None
    _simulate(scenario, out, as_json=as_json)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(each) for each in text.split(",")) if text else ()
    except ValueError:
        raise CommandError(f"--rates must be numbers with commas between them, as 1,1,8, not {text!r}") from None


def _simulate(scenario: "Scenario", out: Path | None, *, as_json: bool) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    from shards.scenario import strategies  # noqa: PLC0415
    from shards.simulate import simulate  # noqa: PLC0415

    compared = strategies(scenario.slices)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{scenario.histories} histories", total=scenario.days * len(compared))
        curves = simulate(scenario, compared, tick=lambda: progress.advance(task))
    if out:
        title = (
            f"{scenario.users:,} users, {scenario.per_day:g} deletions a day, {scenario.shards} shards x"
            f" {scenario.slices} slices, {scenario.orders} orders"
        )
        _draw(lambda draw: draw.draw_curves(curves, title, out), out)
    body = {
        "scenario": asdict(scenario),
        "full_retrain_work": scenario.full_retrain,
        "curves": [asdict(curve) for curve in curves],
    }
    show(body, [*_curve_lines(scenario, curves), *_written(out)], as_json=as_json)


def _curve_lines(scenario: "Scenario", curves: Sequence["Curve"]) -> Iterable[str]:
    yield (
        f"{scenario.users:,} users, {scenario.per_day:g} deletions a day, {scenario.days} days;"
        f" {scenario.shards} shards x {scenario.slices} slices, {scenario.orders} orders;"
        f" {scenario.histories} histories"
    )
    yield ""
    header = (
        "strategy",
        "served depth",
        "",
        "least day",
        "weakest shard",
        "work",
        "per 1,000",
        "rebuilt",
        "late",
    )
    yield from table(header, (_curve_row(scenario, curve) for curve in curves))
    yield ""
    yield "served depth: share of the slices, mean over shards, at the end of the last day before its rebuild"
    yield "work: in trainings of the whole grid from nothing; per 1,000: the same for as many deletions"
    yield "rebuilt: days from the first deletion of a batch to the end of its training; late: missed due dates"


def _curve_row(scenario: "Scenario", curve: "Curve") -> Sequence[object]:
    thousand = 1000 * curve.work[-1] / (scenario.per_day * scenario.days)
    return (
        curve.name,
        f"{curve.depth[-1]:.0%}",
        _bar(curve.depth[-1]),
        f"{min(curve.depth):.0%}",
        f"{min(curve.least):.0%}",
        f"{curve.work[-1]:.2f}",
        f"{thousand:.2f}",
        None if curve.lag is None else f"{curve.lag:.1f} d",
        f"{curve.missed:.2g}",
    )


def _show_model(
    model: str, rate: float | None, layers: int | None, out: Path | None, state: Path, *, as_json: bool
) -> None:
    from service.cli.client import Client  # noqa: PLC0415 - a simulation needs no HTTP client

    asked = {"per_day": rate, "layers": layers}
    with Client.of_state(state) as client:
        body = client.get(
            f"/v1/models/{model}/capacity", {name: str(value) for name, value in asked.items() if value is not None}
        )
    if out:
        _draw(lambda draw: draw.draw_shards(body, out), out)
    show(body, [*_model_lines(body), *_written(out)], as_json=as_json)


def _model_lines(body: dict[str, Any]) -> Iterable[str]:
    full = body["full_retrain"]
    rate = f"{body['per_day']:.3g} deletions a day ({'measured' if body['per_day_measured'] else 'given'})"
    yield f"model {body['model']}, version {body['version']}; {rate}"
    yield ""
    header = ("shard", "depth", "", "clean orders", "until loss", "days", "until dead", "days", "work to full health")
    yield from table(header, (_shard_row(each, full) for each in body["shards"]))
    yield ""
    yield f"first dead shard after {_number(body['first_dead'])} deletions, all dead after {_number(body['all_dead'])}"
    yield f"work to full health: {_share(body['work'], full)} of a full retrain, {_time(body['work_seconds'])}"
    each = body["work_per_deletion"]
    yield (
        f"work of the next deletion, in full retrains: one order {_share(each['one_order'], full)},"
        f" all orders {_share(each['all_orders'], full)},"
        f" SISA {_share(each['sisa'], full) or '- (give --layers)'},"
        f" its part of a monthly full retrain {_share(each['monthly_full_retrain'], full) or '- (give --rate)'}"
    )
    planned = body["planned"]
    if planned["stages"]:
        yield f"policy {body['policy']['kind']}: {planned['stages']} stages from {planned['start']}"
    else:
        yield f"policy {body['policy']['kind']}: nothing to train"


def _shard_row(shard: dict[str, Any], full: float) -> Sequence[object]:
    return (
        shard["shard"],
        f"{shard['depth']}/{shard['slices']}",
        _bar(shard["depth"] / shard["slices"]),
        f"{shard['clean_orders']} ({shard['full_orders']} full)",
        _number(shard["until_loss"]),
        _number(shard["days_until_loss"]),
        _number(shard["until_dead"]),
        _number(shard["days_until_dead"]),
        _share(shard["work"], full),
    )


def _bar(share: float) -> str:
    filled = math.floor(share * BAR + 0.5)
    return "#" * filled + "." * (BAR - filled)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _share(work: float | None, full: float) -> str | None:
    return None if work is None or not full else f"{work / full:.1%}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _written(out: Path | None) -> list[str]:
    return [f"picture: {out}"] if out else []


def _draw(draw: Any, out: Path) -> None:
    from service.cli import pictures  # noqa: PLC0415

    try:
        draw(pictures)
    except OSError as error:
        raise CommandError(
            f"cannot write {out} ({error.strerror}): give --out a file in a directory of yours"
        ) from None
