"""`expunge restore`: after a backup was put back, everything to one moment again, and nothing deleted comes back."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.output import STATE, AsJson, CommandError, StateDir, show


def restore(
    *,
    state: StateDir = STATE,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="Go on without what cannot be brought back. It is recorded.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A tree head that was kept elsewhere: it shows whether all stores are older.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare database, artefact store and ledger, apply every later deletion again, and open. See docs/restore.md."""
    # Deferred: stores, migrations and engines are a second that no other command waits for.
    from service.domain.errors import ExpungeError  # noqa: PLC0415
    from service.evidence.keys import KeyFileError, load_key_set  # noqa: PLC0415
    from service.evidence.tree_head import TreeHeadError  # noqa: PLC0415
    from service.standalone.errors import StandaloneError  # noqa: PLC0415
    from service.standalone.offline import opened  # noqa: PLC0415
    from service.store.artifacts import open_artifacts  # noqa: PLC0415
    from service.store.database import make_pool, transaction  # noqa: PLC0415
    from service.store.migrate import SchemaError  # noqa: PLC0415
    from service.store.restores import MODE, lock  # noqa: PLC0415
    from workers.restore import Stores  # noqa: PLC0415
    from workers.restore import restore as run  # noqa: PLC0415
    from workers.restore_survey import RestoreError  # noqa: PLC0415

    kept = _read(checkpoint)
    try:
        with opened(state) as found:
            settings = found.settings
            with make_pool(settings.database_owner_url, size=4, options=MODE) as pool, pool.connection() as one:
                if not lock(one):
                    raise CommandError("another `expunge restore` runs: wait for it")
                one.commit()
                with transaction(pool):  # Postgres answers
                    pass
                artifacts = open_artifacts(settings.artifact_url, settings.file_keys_url)
                stores = Stores(settings, pool, artifacts, load_key_set(settings.keys_dir))
                report = run(stores, checkpoint=kept, accept_loss=accept_loss, tell=lambda line: _tell(line, as_json))
    except (RestoreError, TreeHeadError, KeyFileError, StandaloneError, SchemaError, ExpungeError, OSError) as error:
        raise CommandError(f"not restored, and nothing is taken in or served: {error}") from None
    shown = asdict(report)
    del shown["survey"]
    show(shown, _lines(shown), as_json=as_json)


def _tell(line: str, as_json: bool) -> None:
    if not as_json:
        print(line)


def _lines(report: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if report["recovered"]:
        lines.append(f"back from payload files: {report['recovered']} records that the database lacked")
    if report["records"]:
        lines.append(
            f"upload again: {report['records']} records left, since nobody knows whose they are or they are lost"
        )
    if report["certificates"]:
        lines.append(f"certificates of {len(report['certificates'])} requests are with their holders only:")
        lines += [f"  {each}" for each in report["certificates"]]
    if report["keys"]:
        lines.append(f"make API keys again for {', '.join(report['keys'])}: their secrets are lost")
    lines += [f"not applied: {each['what']} {each['body']}" for each in report["losses"]]
    lines.append("not in the ledger at all: callers' references and idempotency keys, recipients of exports")
    return lines


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from None
