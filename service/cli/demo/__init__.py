"""`expunge demo`: the main job end to end, on real reviews, against real programs.

Read in this order: `command` (what is run), `assets` and `sample` (the records), `stack` (the programs), `journey`
(what happens), `calls`, `traffic`, `evidence` (how it is done and measured), `show` and `report` (what comes out).
"""

from typing import Annotated

import typer


def demo(
    records: Annotated[int, typer.Option(min=200, max=6000, help="Training records, about.")] = 2000,
    held_out: Annotated[int, typer.Option(min=50, max=2000, help="Records to measure on, about.")] = 800,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON; all else on stderr.")] = False,
) -> None:
    """Train on real reviews, serve, delete a reviewer, verify, rebuild. Exit code 0 only if all of it held."""
    from service.cli.demo.command import run  # noqa: PLC0415 - the command line starts without it

    run(records, held_out, as_json=as_json)
