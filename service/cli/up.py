"""`expunge up`: everything on one machine, in the foreground."""

from pathlib import Path
from typing import Annotated

import typer


def up(
    state: Annotated[Path, typer.Option(help="Directory that holds all state; made when absent.")] = Path(".expunge"),
    port: Annotated[int, typer.Option(help="Port of the API; model servers take the ones behind it.")] = 8700,
    replicas: Annotated[int, typer.Option(help="Number of model servers.")] = 2,
    trainers: Annotated[int, typer.Option(help="Number of training processes, one thread each.")] = 2,
) -> None:
    """Start Postgres, Valkey, API, model servers, workers and loops; Ctrl-C stops them all."""
    from service.standalone.up import up as run  # noqa: PLC0415 - the command line starts without it

    raise typer.Exit(run(state, port=port, replicas=replicas, trainers=trainers))
