"""The deletion certificate as a page that a lawyer can read: everything on it is from the signed statement."""

import base64
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from service.domain.errors import ConflictError
from service.evidence.certificate import PREDICATE_TYPE, digest_of_envelope
from shards.digest import canonical

LISTED = 5
"""Open items that are named on the page; all of them are in the JSON."""
ASKED = {"erase": "erasure", "restrict": "restriction of processing", "object": "objection to processing"}
REGIMES = {"gdpr": "GDPR", "ccpa": "CCPA", "voluntary": "none: granted voluntarily", None: "none stated"}
DONE = {
    "erased": "taken out of the model {}, and destroyed",
    "restricted": "taken out of the model {}, and sealed; nothing was destroyed",
}
ANSWERED = {
    "acknowledged": "acknowledged the new version",
    "ended": "had ended",
    "fenced_by_expiry": "fenced when the lease ran out",
}


def compose(envelope: dict[str, Any]) -> dict[str, Any]:
    """The content of template `certificate`; its digest is the certificate's.

    Raises:
        ConflictError: a certificate of another version.
    """
    statement = json.loads(base64.b64decode(envelope["payload"]))
    if statement["predicateType"] != PREDICATE_TYPE:
        raise ConflictError("this certificate is of a version that is not put on paper: take the JSON")
    said = statement["predicate"]
    return {
        "date": said["issuer"]["issued_at"],
        "digest": digest_of_envelope(envelope),
        "keyid": envelope["signatures"][0]["keyid"],
        "attached": {
            "name": "certificate.json",
            "text": canonical(envelope).decode(),
            "about": "The signed certificate that this page was made from.",
        },
        "model": said["model"]["name"],
        "erased": said["outcome"] == "erased",
        "summary": _summary(said),
        "facts": _facts(said),
        "times": _times(said),
        "done": _done(said),
        "claims": [
            {name: claim[name] for name in ("claim", "statement", "strength", "must_be_trusted")}
            for claim in said["claims"]
        ],
        "open": _open(said["open_items"]),
        "assumptions": [{name: each[name] for name in ("code", "statement")} for each in said["assumptions"]],
        "tree_head": _tree_head(said["ledger"]),
        "tool": f"{said['issuer']['tool']} {said['issuer']['version']}",
    }


def _summary(said: Mapping[str, Any]) -> str:
    number, done = len(said["records"]), DONE[said["outcome"]].format(said["model"]["name"])
    return f"{_count(number, 'record')} {'was' if number == 1 else 'were'} {done}"


def _facts(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    request, model = said["request"], said["model"]
    ended = next((row["at"] for row in said["times"] if row["state"] == "completed"), said["issuer"]["issued_at"])
    punctual = "in time" if ended <= request["due_at"] else "after it was due"
    return [
        _fact("Request", request["id"], code=True),
        _fact("Asked for", f"{ASKED[request['kind']]}; law: {REGIMES[request['regime']]}"),
        _fact("Received", _minute(request["received_at"])),
        _fact("Due", f"{_minute(request['due_at'])}; answered {punctual}"),
        _fact("Model", f"{model['name']}, version {said['after']['version']}"),
        _fact("Method", said["method"]),
        _fact("Person", request["subject_commitment"], code=True),
    ]


def _fact(name: str, value: str, *, code: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "code": code}


def _times(said: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = sorted(said["times"], key=lambda row: row["at"])
    first = datetime.fromisoformat(rows[0]["at"]) if rows else None
    return [
        {
            "state": row["state"].replace("_", " "),
            "day": row["at"][:10],
            "time": row["at"][11:23],
            "since": _elapsed((datetime.fromisoformat(row["at"]) - first).total_seconds()) if first else "",
        }
        for row in rows
    ]


def _done(said: Mapping[str, Any]) -> list[dict[str, str]]:
    files = [row for stage in said["tainted"] for row in stage["artifacts"]]
    how = Counter(row["how"] for row in said["replicas"])
    freed = sum(row["freed"] for row in said["replicas"])
    replays = Counter(row["outcome"] for row in said["replays"])
    records, cells = _count(len(said["records"]), "record"), _count(len(said["cells"]), "cell")
    tainted, served = _count(len(said["tainted"]), "stage"), _count(len(said["stages"]), "stage")
    proofs = sum(len(row["lacks"]) for row in said["manifests"])
    rows = [
        (
            "Records",
            f"{records} in {_count(len(_places(said['records'])), 'cell')}; {cells} written again without them",
        ),
        (
            "Parts of the model (stages)",
            f"{tainted} had been trained on them; none of the {served} behind version {said['after']['version']} was",
        ),
        ("Files of those stages", _files(files)),
        ("Files of the records", _files(said["payloads"])),
        (
            "Model servers",
            "; ".join(f"{count} {ANSWERED[kind]}" for kind, count in sorted(how.items()))
            + (
                f"; {freed} of {len(said['replicas'])} confirmed that no such weight is in memory"
                if how
                else "none ran"
            ),
        ),
        (
            "Merkle paths",
            f"{proofs:,} show that a manifest which a served stage was trained on lacks a record",
        ),
        (
            "Replays",
            ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(replays.items()))
            + " (trained again from nothing, digests compared)"
            if replays
            else "none yet",
        ),
    ]
    return [{"name": name, "value": value} for name, value in rows]


def _places(rows: Sequence[Mapping[str, Any]]) -> set[tuple[int, int]]:
    return {(row["shard"], row["slice"]) for row in rows}


def _files(rows: Sequence[Mapping[str, Any]]) -> str:
    """What became of them, with the first and the last time of looking."""
    if not rows:
        return "none"
    destroyed = sum(row["destroyed_at"] is not None for row in rows)
    looks = sorted(moment for row in rows for moment in row["absent_at"])
    if not destroyed:
        return f"{_count(len(rows), 'file')}, sealed"
    absent = sum(bool(row["absent_at"]) for row in rows)
    seen = (
        f"; {absent} found absent, first at {looks[0][:19]}, last at {looks[-1][:19]}".replace("T", " ")
        if looks
        else ""
    )
    return f"{destroyed} of {_count(len(rows), 'file')} destroyed{seen}"


def _open(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    shown = [
        {"what": each["detail"], "name": each["name"], "until": _minute(each["until"]) if each["until"] else None}
        for each in items[:LISTED]
    ]
    return {"shown": shown, "more": len(items) - len(shown)}


def _tree_head(ledger: Mapping[str, Any]) -> dict[str, Any]:
    """Origin and size of the checkpoint (C2SP tlog-checkpoint: its first two lines)."""
    origin, size, *_ = str(ledger["checkpoint"]).split("\n")
    return {"origin": origin, "size": size, "entries": len(ledger["entries"])}


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _minute(moment: str) -> str:
    return f"{moment[:10]} {moment[11:16]} UTC"


def _elapsed(seconds: float) -> str:
    for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"+ {seconds / size:.1f} {unit}"
    return f"+ {seconds:.3f} s"
