"""`expunge model versions`, `serve`, `unpin`, `gate`, `canary`: how versions come into service, and back."""

from typing import Annotated, Any

import typer

from service.cli.client import Client
from service.cli.output import STATE, AsJson, CommandError, StateDir, show, table

VERSIONS = ("VERSION", "CAUSE", "DEPTHS", "CANONICAL", "CREATED", "")
TRIALS = ("ASSEMBLY", "STATE", "SCORE", "SERVED", "ROWS", "CAME", "ERROR")

Reason = Annotated[str, typer.Option("--reason", help="A code of your own, as regression; no name or address.")]
MaybeReason = Annotated[str | None, typer.Option("--reason", help="A code of your own; no name or address.")]


def versions(name: str, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """A model's versions, the newest first."""
    with Client.of_state(state) as client:
        model = client.get(f"/v1/models/{name}")
        found = client.get(f"/v1/models/{name}/versions")
    rows = [
        (
            each["version"],
            each["cause"],
            "/".join(str(depth) for depth in each["depths"]),
            "yes" if each["canonical"] else "",
            each["created_at"][:19],
            _mark(model, each["version"]),
        )
        for each in found["versions"]
    ]
    lines = [*table(VERSIONS, rows), f"floor {found['floor']}: what is below is never served again under its number"]
    show(found, lines, as_json=as_json)


def serve(
    name: str,
    version: Annotated[int, typer.Argument(min=1, help="The version whose assembly is to serve again.")],
    *,
    reason: Reason,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Roll back: serve an earlier version's assembly, as a new version, until `unpin`. Refused where it is tainted."""
    with Client.of_state(state) as client:
        done = client.post(f"/v1/models/{name}/versions/{version}:serve", {"reason_code": reason})
    line = (
        f"version {version} of {name} serves again as version {done['version']}; expunge model unpin {name} ends that"
    )
    show(done, [line], as_json=as_json)


def unpin(name: str, *, reason: Reason, state: StateDir = STATE, as_json: AsJson = False) -> None:
    """End a rollback: what was trained since comes into service."""
    with Client.of_state(state) as client:
        done = client.post(f"/v1/models/{name}/versions:unpin", {"reason_code": reason})
    show(done, [f"{name} is not pinned any more"], as_json=as_json)


def gate(
    name: str,
    *,
    within: Annotated[float | None, typer.Option(min=0, help="Points it may be below what serves.")] = None,
    at_least: Annotated[float | None, typer.Option(help="Lowest score that may serve, as 0.8.")] = None,
    off: Annotated[bool, typer.Option("--off", help="No gate.")] = False,
    override: Annotated[bool, typer.Option("--override", help="Serve what was refused; needs --reason.")] = False,
    reason: MaybeReason = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Show what came to a model's gate, set its bounds, or serve what it refused."""
    bounds = {"within": within, "at_least": at_least}
    setting = within is not None or at_least is not None
    if setting + off + override > 1:
        raise CommandError("give bounds, --off or --override, one of them at a time")
    with Client.of_state(state) as client:
        if override:
            client.post(f"/v1/models/{name}/gate:override", {"reason_code": _given(reason)})
        elif setting or off:
            client.patch(f"/v1/models/{name}", {"gate": None if off else bounds})
        found = client.get(f"/v1/models/{name}/gate")
    rows = [
        (
            each["assembly"][:12],
            each["state"],
            _score(each["score"]),
            _score(each["base_score"]),
            each["rows"],
            each["created_at"][:19],
            each["error"],
        )
        for each in found["trials"]
    ]
    lines = [_bounds(found), *(table(TRIALS, rows) if rows else ())]
    if any(each["state"] == "refused" for each in found["trials"][:1]):
        lines.append(f"the newest was refused: rebuild, change the bounds, or expunge model gate {name} --override")
    show(found, lines, as_json=as_json)


def canary(
    name: str,
    *,
    share: Annotated[int | None, typer.Option(min=1, max=99, help="Per cent of the requests.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Promote after this time without an error.")] = None,
    off: Annotated[bool, typer.Option("--off", help="New versions get all traffic at once.")] = False,
    promote: Annotated[bool, typer.Option("--promote", help="Give it all traffic; needs --reason.")] = False,
    abort: Annotated[bool, typer.Option("--abort", help="Take its traffic away; needs --reason.")] = False,
    reason: MaybeReason = None,
    state: StateDir = STATE,
    as_json: AsJson = False,
) -> None:
    """Show a model's canary, set what share new versions get at first, promote or abort the one that runs."""
    if (share is not None) + off + promote + abort > 1:
        raise CommandError("give --share, --off, --promote or --abort, one of them at a time")
    if minutes is not None and share is None:
        raise CommandError("--minutes goes with --share")
    with Client.of_state(state) as client:
        if promote or abort:
            verb = "promote" if promote else "abort"
            client.post(f"/v1/models/{name}/canary:{verb}", {"reason_code": _given(reason)})
        elif off or share is not None:
            body = None if off else {"share": share, "minutes": minutes}
            client.patch(f"/v1/models/{name}", {"canary": body})
        model = client.get(f"/v1/models/{name}")
    show(model, [_canary(model)], as_json=as_json)


def _given(reason: str | None) -> str:
    if reason is None:
        raise CommandError("say why with --reason, by a code of your own")
    return reason


def _mark(model: dict[str, Any], version: int) -> str:
    if version == model["pinned"]:
        return "pinned"
    if model["stable"] is not None:
        return {model["version"]: "canary", model["stable"]: "stable"}.get(version, "")
    return "serves" if version == model["version"] else ""


def _bounds(found: dict[str, Any]) -> str:
    gate = found["gate"]
    if gate is None:
        return f"model {found['model']}: no gate"
    near = [] if gate["within"] is None else [f"within {gate['within']} points of what serves"]
    least = [] if gate["at_least"] is None else [f"at least {gate['at_least']}"]
    return f"model {found['model']}: a rebuilt assembly must be {' and '.join([*near, *least])}"


def _canary(model: dict[str, Any]) -> str:
    policy = model["canary"]
    if policy is None:
        return f"model {model['name']}: no canary, new versions get all traffic at once"
    share = f"model {model['name']}: a new version gets {policy['share']} % of the requests first"
    if model["stable"] is None:
        return f"{share}; none is running"
    until = f"until {model['canary_until'][:19]}" if model["canary_until"] else "until it is promoted or aborted"
    return f"{share}; version {model['version']} runs beside version {model['stable']} {until}"


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
