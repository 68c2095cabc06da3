"""`expunge proxy`: the fence in front of another server."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from service.settings import settings


def proxy(
    models: Annotated[list[str], typer.Argument(help="Models to serve, of engine s3t.")],
    upstream: Annotated[str, typer.Option(help="URL of the server behind; nobody else may reach it.")],
    adapters: Annotated[Path, typer.Option(help="Directory that both see under this path, best in memory (tmpfs).")],
    speaks: Annotated[Literal["openai", "oip"], typer.Option(help="The server's protocol.")] = "openai",
    hook: Annotated[str, typer.Option(help="Program that lists, loads and unloads adapters instead of HTTP.")] = "",
    unload_frees: Annotated[
        bool, typer.Option("--unload-frees", help="An adapter that the server lists no more is out of its memory.")
    ] = False,
    answers_as: Annotated[str, typer.Option(help="The model that its answers name, where not the adapter.")] = "",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the server may say nothing.")] = 60.0,
    patience: Annotated[float, typer.Option(min=0, help="Seconds that calls wait for an adapter to be loaded.")] = 10.0,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8801,
    name: Annotated[str, typer.Option(help="Shown in leases and logs.")] = "proxy",
) -> None:
    """Serve merged adapters through vLLM, TGI, Triton or MLServer, with the lease of a model server."""
    from service.logs import configure_logs  # noqa: PLC0415 - the command line starts without it
    from service.proxy.program import Options, run  # noqa: PLC0415 - as above
    from service.proxy.relay import Upstream  # noqa: PLC0415 - as above

    configure_logs(name)
    config = settings()
    there = Upstream(upstream, config.upstream_key, timeout, patience, answers_as)
    options = Options(
        there,
        speaks,
        frozenset(models),
        adapters.resolve(),
        hook=shlex.split(hook),
        frees=unload_frees,
        host=host,
        port=port,
        name=name,
    )
    raise typer.Exit(run(config, options))
