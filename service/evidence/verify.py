"""Check a deletion certificate offline, with nothing but the file and the operator's public key.

Written to be read by an auditor: it shares only hash functions with the writer, opens no connection, and
takes nothing in the certificate for granted that can be derived again. What the operator's signature alone
carries is said in each check's `strength`. `form` is the closed form of a certificate, `opening` unpacks it,
`destruction` looks for what should be gone; docs/certificate.md says what the fields mean.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.evidence.destruction import destruction, directory_check
from service.evidence.form import ASSUMED, CLAIMS, OFFLINE, REDERIVED, SIGNED, STATES
from service.evidence.opening import OPENING, Case, Refused, Step, read_json, require
from shards.digest import digest_of
from shards.merkle import root

__all__ = ["Check", "read_json", "verify"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the result."""

    name: str
    passed: bool
    detail: str
    strength: str
    """What the line rests on when it passed."""


def verify(
    envelope: Mapping[str, Any],
    public_key_pem: bytes,
    *,
    artifacts: Path | None = None,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Check]:
    """Every check in order; the certificate holds if all passed. Nothing is read of one that does not open.

    Args:
        envelope: the certificate file, parsed by `read_json`.
        public_key_pem: the operator's key, from somewhere else than the certificate.
        artifacts: the artefact store's directory, to look for what should be gone.
        on_bytes: called with the bytes hashed so far and all there are.
    """
    case = Case(envelope, public_key_pem)
    checks: list[Check] = []
    for name, strength, step in OPENING:
        checks.append(_run(name, strength, step, case))
        if not checks[-1].passed:
            return checks
    checks += [_run(name, strength, step, case) for name, strength, step in CONTENT]
    if artifacts is not None:
        directory = artifacts
        checks.append(_run("artefact directory", OFFLINE, lambda c: directory_check(c, directory, on_bytes), case))
    return checks


def _run(name: str, strength: str, step: Callable[[Case], str], case: Case) -> Check:
    try:
        return Check(name, passed=True, detail=step(case), strength=strength)
    except Refused as refusal:
        return Check(name, passed=False, detail=str(refusal), strength=strength)


# Content. From here on the form is as SHAPE says.


def _subject(case: Case) -> str:
    after = case.said["after"]
    digest = digest_of(after["assembly"])
    name = f"{case.said['model']['name']}@{after['version']}"
    require(
        case.statement["subject"] == [{"name": name, "digest": {"sha256": digest}}],
        f"the statement is not about {name} with the digest {digest[:12]} of the assembly in it",
    )
    return f"{name} is the assembly {digest[:12]}"


def _stages(case: Case) -> str:
    """The keys in the assembly are digests of the inputs listed, ancestor by ancestor."""
    assembly = case.said["after"]["assembly"]
    require(assembly["recipe"] == case.said["model"]["recipe"], "the assembly was made with another recipe")
    known = {digest_of(stage): stage for stage in case.said["stages"]}
    require(len(known) == len(case.said["stages"]), "a stage is listed twice")
    used: set[str] = set()
    cells = [(-1, -1)]
    for seat, member in enumerate(assembly["members"]):
        if member is None:
            continue
        key, depth = member["stage"], len(member["artifacts"])
        stage = known.get(key, {})
        require(stage, f"no inputs listed give the stage key {key[:12]} of seat {seat}")
        shard = seat
        if assembly["aggregation"] == "sums":  # a seat is a cell there, shard after shard
            _well_formed(stage)
            shard = stage["shard"]
            cells.append((shard, stage["prefix"][0]))
            require(depth == 1 and cells[-1] > cells[-2], f"seat {seat} is not a cell of its own")
        require(
            stage["shard"] == shard and stage["prefix"] == member["prefix"] and len(stage["prefix"]) == depth,
            f"shard {shard} is served by a stage of another shard or depth",
        )
        while True:
            _well_formed(stage)
            require(stage["recipe"] == assembly["recipe"], f"stage {key[:12]} has another recipe")
            used.add(key)
            if stage["parent"] is None:
                break
            key, child = stage["parent"], stage
            stage = known.get(key, {})
            require(stage, f"no inputs listed give the ancestor {key[:12]} in shard {shard}")
            require(
                stage["shard"] == shard
                and (stage["prefix"], stage["roots"]) == (child["prefix"][:-1], child["roots"][:-1]),
                f"the parent {key[:12]} did not read the same manifests as its child",
            )
    require(used == known.keys(), "a stage is listed that the assembly does not stand on")
    return f"{len(known)} keys derived from their inputs, ancestors included"


def _well_formed(stage: Mapping[str, Any]) -> None:
    prefix = stage["prefix"]
    right = len(prefix) == len(stage["roots"]) == len(set(prefix)) > 0
    require(
        right and (stage["parent"] is None) == (len(prefix) == 1),
        "a stage's slices, roots and parent disagree",
    )


def _lineage(stage: Mapping[str, Any]) -> set[tuple[int, int, str]]:
    _well_formed(stage)
    return {(stage["shard"], s, r) for s, r in zip(stage["prefix"], stage["roots"], strict=True)}


def _touched(said: Mapping[str, Any]) -> set[tuple[int, int, str]]:
    return {(cell["shard"], cell["slice"], cell["root"]) for cell in said["touched"]}


def _influence(case: Case) -> str:
    # By root alone: stricter than by cell, and no slip in a cell's number can hide a match.
    touched = {cell["root"] for cell in case.said["touched"]}
    for stage in case.said["stages"]:
        require(
            touched.isdisjoint(stage["roots"]),
            f"served stage {digest_of(stage)[:12]} read a touched manifest",
        )
    return f"{len(case.said['stages'])} served stages read none of {len(touched)} touched manifests"


def _tainted(case: Case) -> str:
    touched = _touched(case.said)
    served = {digest_of(stage) for stage in case.said["stages"]}
    members = [member for member in case.said["after"]["assembly"]["members"] if member]
    served |= {member["stage"] for member in members}
    keys = [digest_of(entry["stage"]) for entry in case.said["tainted"]]
    require(len(set(keys)) == len(keys), "a tainted stage is listed twice")
    for key, entry in zip(keys, case.said["tainted"], strict=True):
        require(
            _lineage(entry["stage"]) & touched,
            f"stage {key[:12]} is called tainted but read no touched manifest",
        )
        require(key not in served, f"tainted stage {key[:12]} is in the assembly")
    weights = {digest for member in members for digest in member["artifacts"]}
    bad = {artifact["digest"] for entry in case.said["tainted"] for artifact in entry["artifacts"]}
    require(weights.isdisjoint(bad), "the artefact of a tainted stage is served under another stage's key")
    return f"{len(keys)} stages, each with a touched manifest in its lineage, none served"


def _records(case: Case) -> str:
    """The manifests called touched fit the records and the cells written again."""
    said, touched = case.said, _touched(case.said)
    for name in ("record_id", "commitment"):
        found = {record[name] for record in said["records"]["list"]}
        require(
            len(found) == said["records"]["count"] == len(said["records"]["list"]),
            f"the {name}s do not add up",
        )
    require(said["touched"] or not said["records"]["list"], "records, but no manifest that held them")
    require(len(touched) == len(said["touched"]), "a touched manifest is listed twice")
    require(root([]).hex() not in {cell["root"] for cell in said["touched"]}, "the empty manifest held no record")
    for cell in said["cells"]:
        place = (cell["shard"], cell["slice"])
        require((*place, cell["before"]) in touched, f"cell {place} was written again, but was not touched before")
        require((*place, cell["after"]) not in touched, f"cell {place} is still touched afterwards")
    rewritten = {(cell["shard"], cell["slice"]) for cell in said["cells"]}
    needed = {(shard, part) for shard, part, _ in touched if said["outcome"] == "erased"}
    require(rewritten == needed, "the cells written again are not those that the touched manifests are of")
    count = said["records"]["count"]
    return f"{count} records in {len(touched)} manifests; {len(rewritten)} cells written again"


def _versions(case: Case) -> str:
    before, after = case.said["before"], case.said["after"]
    never = after["version"] == 0  # nothing was trained yet, so nothing ever answered
    require(never or before["version"] < after["version"], "the version after is not later than the one before")
    require(not never or not any(after["assembly"]["members"]), "version 0 serves nothing, but a member is listed")
    require((before["assembly"] is None) == (before["version"] == 0), "only version 0 has no assembly")
    require(after["floor"] >= after["version"], "the floor lets an older version be served")
    return f"{before['version']} replaced by {after['version']}, floor {after['floor']}"


def _times(case: Case) -> str:
    said = case.said
    states = [entry["state"] for entry in said["times"]]
    moments = [entry["at"] for entry in said["times"]] + [said["issuer"]["issued_at"]]
    require(states == [state for state in STATES if state in states], "the states are not in their order")
    require(
        {"received", "deactivating", "deactivated"} <= set(states),
        "a state that every deletion passes is missing",
    )
    require(("erasing" in states) == (said["outcome"] == "erased"), "the outcome and the states disagree")
    require(moments == sorted(moments), "the times run backwards")
    require(said["request"]["received_at"] < said["request"]["due_at"], "due before it was received")
    due = "before" if moments[-1] <= said["request"]["due_at"] else "after"
    return f"{len(states)} states in order; issued {due} the due date"


def _replicas(case: Case) -> str:
    said = case.said
    deactivated = [entry["at"] for entry in said["times"] if entry["state"] == "deactivated"]
    require(deactivated, "never deactivated")
    for entry in said["replicas"]:
        who = entry["process_id"]
        require(
            entry["at"] <= deactivated[0],
            f"deactivated before process {who} acknowledged, ended or was fenced",
        )
        require(
            entry["how"] != "acknowledged" or entry["covers"] >= said["after"]["version"],
            f"process {who} acknowledged an older version",
        )
        require(entry["freed"] or entry["freed_at"] is None, f"process {who} freed its memory and did not")
    ids = [entry["process_id"] for entry in said["replicas"]]
    require(len(set(ids)) == len(ids), "a process is listed twice")
    fenced = sum(entry["how"] == "fenced_by_expiry" for entry in said["replicas"])
    return f"{len(ids)} processes had acknowledged, ended or been fenced, {fenced} of them by expiry"


def _claims(case: Case) -> str:
    said = case.said
    made = [entry["claim"] for entry in said["claims"]]
    allowed = {"deactivated", said["outcome"]}
    if said["model"]["provenance"] != "own_contains_subjects":
        allowed |= {"influence-free", "retrain-equal"}
    require(
        (said["model"]["backbone"] is None) == (said["model"]["provenance"] is None),
        "a backbone without a provenance, or a provenance without a backbone",
    )
    require(len(set(made)) == len(made), "a claim is made twice")
    require({"deactivated", said["outcome"]} <= set(made), "a claim that the outcome needs is missing")
    require(set(made) <= allowed, "a claim is made that the outcome or the backbone does not support")
    require(
        said["request"]["kind"] != "restrict" or said["outcome"] == "restricted",
        "a restriction erased something",
    )
    require(said["request"]["kind"] != "erase" or said["outcome"] == "erased", "an erasure erased nothing")
    open_codes = {item["code"] for item in said["open_items"]}
    require(
        not {"retrain-equal", "retrain_equal_not_claimed"} <= {*made, *open_codes},
        "retrain-equal is claimed and said not to be",
    )
    for entry in said["claims"]:
        strength, statement = CLAIMS[entry["claim"]]
        require(entry["strength"] == strength, f"{entry['claim']} is not {entry['strength']} but {strength}")
        require(entry["statement"] == statement, f"{entry['claim']} is not worded as version 1 words it")
    texts = [
        text for name in ("claims", "assumptions", "open_items") for entry in said[name] for text in entry.values()
    ]
    overstated = [text for text in texts if re.search(r"\b(prove|proof|guarantee)", text, re.IGNORECASE)]
    require(not overstated, "a text claims proof of what is only signed")
    return f"{', '.join(made)}; none overstated"


def _assumptions(case: Case) -> str:
    codes = [entry["code"] for entry in case.said["assumptions"]]
    require(sorted(codes) == sorted(ASSUMED), "the assumptions are not those of version 1")
    return f"{len(codes)} stated; read them"


def _open_items(case: Case) -> str:
    items = case.said["open_items"]
    named = {item["detail"] for item in items if item["code"] == "memory_release_not_confirmed"}
    unfreed = {entry["process_id"] for entry in case.said["replicas"] if not entry["freed"]}
    require(named == unfreed, "the processes that did not confirm releasing memory are not those named as open")
    return "; ".join(f"{item['code']}: {item['detail']}" for item in items) or "none"


CONTENT: tuple[Step, ...] = (
    ("subject", REDERIVED, _subject),
    ("stages", REDERIVED, _stages),
    ("influence-free", REDERIVED, _influence),
    ("tainted stages", REDERIVED, _tainted),
    ("records and cells", OFFLINE, _records),
    ("versions", SIGNED, _versions),
    ("destruction", SIGNED, destruction),
    ("times", SIGNED, _times),
    ("replicas", SIGNED, _replicas),
    ("claims", OFFLINE, _claims),
    ("assumptions", OFFLINE, _assumptions),
    ("open items", SIGNED, _open_items),
)
