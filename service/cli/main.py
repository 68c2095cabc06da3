"""The `expunge` command. Each command lives in a module of its own and loads what is heavy when it runs."""

import sys

import typer
from pydantic import ValidationError

from service.cli import challenge, data_commands, do_not_train, keys, ledger_commands, model_commands
from service.cli.capacity import capacity
from service.cli.demo import demo
from service.cli.doctor import doctor
from service.cli.export import export
from service.cli.hold_commands import hold, holds, lift, release, revoke
from service.cli.output import CommandError, complain
from service.cli.proxy import proxy
from service.cli.release_commands import canary, gate, serve, unpin, versions
from service.cli.replay import replay
from service.cli.request_commands import certificate, delete, preview, requests
from service.cli.restore import restore
from service.cli.up import up
from service.cli.verify import verify

app = typer.Typer(
    name="expunge",
    help="Take a person's data out of a model in production, exactly, and give evidence of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (versions, serve, unpin, gate, canary):
    model_commands.app.command()(command)
app.add_typer(data_commands.app, name="dataset")
app.add_typer(model_commands.app, name="model")
app.add_typer(keys.app, name="keys")
app.add_typer(ledger_commands.app, name="ledger")
app.add_typer(challenge.app, name="challenge")
app.add_typer(do_not_train.app, name="do-not-train")
for command in (
    up,
    demo,
    delete,
    preview,
    requests,
    lift,
    revoke,
    hold,
    holds,
    release,
    certificate,
    export,
    verify,
    replay,
    restore,
    capacity,
    doctor,
    proxy,
):
    app.command()(command)


def main() -> None:
    """Run the command line; the exit code is 0 only on success."""
    try:
        app()
    except CommandError as error:
        complain(str(error))
        sys.exit(1)
    except ValidationError as error:  # a setting; its value may be a secret
        wrong = ", ".join(f"EXPUNGE_{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors())
        complain(f"cannot use the environment: {wrong}")
        sys.exit(1)
