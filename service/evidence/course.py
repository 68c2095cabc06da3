"""What happened when: the events behind a certificate in the ledger, and the statement held against them."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from service.evidence.form import STATES
from service.evidence.log_check import Event, Head, open_event, open_head
from service.evidence.opening import Case, Refused, require
from shards.digest import digest_of

OPENINGS_KEPT = timedelta(days=30)
"""Openings of events are never erased earlier, so a younger event can be shown."""
ENTERED = {"received": "request.received"} | {
    state: f"target.{state}" for state in ("deactivating", "deactivated", "erasing")
}
REPLICA = {
    "acknowledged": {"replica.registered", "replica.acknowledged"},
    "fenced_by_expiry": {"replica.fenced"},
    "ended": {"replica.ended"},
}


def head_of(case: Case) -> Head:
    """The tree head in a statement."""
    return open_head(case.said["ledger"]["checkpoint"], case.keys)


def events_of(case: Case) -> list[Event]:
    """The events in a statement, each under its tree head.

    Raises:
        Refused: one is not, or is of another request, or they are not in the ledger's order.
    """
    head = head_of(case)
    found = [open_event(entry, head) for entry in case.said["ledger"]["entries"]]
    order = [event.index for event in found]
    require(order == sorted(set(order)), "the entries are not in the order of the ledger")
    request = case.said["request"]
    mine = request if isinstance(request, str) else request["id"]
    for event in found:  # a file or stage that two deletions share is destroyed for one of them
        ours = event.request_id in {None, mine} or event.kind == "artifact.destroyed"
        require(ours, "an entry is of another request")
    return found


def tree_head(case: Case) -> str:
    """The ledger's tree head is signed."""
    head = head_of(case)
    return f"{head.origin}, size {head.size}, root {head.root.hex()[:12]}"


def entries(case: Case) -> str:
    """Every event listed is opened by what is given, and lies in the ledger under that tree head."""
    return f"{len(events_of(case))} events hashed up to the tree head's root"


def versions(case: Case) -> str:
    """Versions and floor rise."""
    before, after = case.said["before"], case.said["after"]
    never = after["version"] == 0  # nothing was trained yet, so nothing ever answered
    require(never or before["version"] < after["version"], "the version after is not later than the one before")
    require(not never or not any(after["assembly"]["members"]), "version 0 serves nothing, but a member is listed")
    require((before["assembly"] is None) == (before["version"] == 0), "only version 0 has no assembly")
    require(after["floor"] >= after["version"], "the floor lets an older version be served")
    return f"{before['version']} replaced by {after['version']}, floor {after['floor']}"


def times(case: Case) -> str:
    """States in their order, each at the time of its event; order is the ledger's, and a clock set back is said."""
    said, events = case.said, events_of(case)
    states = [entry["state"] for entry in said["times"]]
    issued = said["issuer"]["issued_at"]
    require(states == [state for state in STATES if state in states], "the states are not in their order")
    require(
        {"received", "deactivating", "deactivated", "completed"} <= set(states),
        "a state that every deletion passes is missing",
    )
    require(("erasing" in states) == (said["outcome"] == "erased"), "the outcome and the states disagree")
    places = [_entered(entry, events, said) for entry in said["times"]]
    known = [place for place in places if place is not None]
    require(known == sorted(known), "the ledger has the states in another order")
    back = _step_back([event.time for event in events] + [issued])
    require(back == said["clock_back_microseconds"], "the times run backwards, and the certificate does not say so")
    moments = [micros(entry["at"]) for entry in said["times"]]
    require(all(one <= other + back for one, other in pairwise(moments)), "the times run backwards")
    require(said["request"]["received_at"] < said["request"]["due_at"], "due before it was received")
    due = "before" if issued <= said["request"]["due_at"] else "after"
    flag = f"; the clock went back by {back / 1e6:.6f} s" if back else ""
    return f"{len(states)} states in order, as in the ledger; issued {due} the due date{flag}"


def _entered(entry: dict[str, Any], events: Sequence[Event], said: dict[str, Any]) -> int | None:
    """Index of the event by which a state was entered; None where none can be had."""
    if entry["state"] == "completed":
        require(entry["at"] == said["issuer"]["issued_at"], "completed at another time than it was issued")
        return None
    first = next((event for event in events if event.kind == ENTERED.get(entry["state"])), None)
    if first is None:
        require(_may_be_erased(entry["at"], said), f"no event in the ledger says {entry['state']}")
        return None
    require(first.time == entry["at"], f"the ledger has {entry['state']} at another time, {first.time}")
    require(first.request_id == said["request"]["id"], f"the event {first.kind} is not of this request")
    return first.index


def _may_be_erased(at: str, said: dict[str, Any]) -> bool:
    return datetime.fromisoformat(said["issuer"]["issued_at"]) - datetime.fromisoformat(at) > OPENINGS_KEPT


def micros(text: str) -> int:
    """A time as microseconds since 1970."""
    return round(datetime.fromisoformat(text).timestamp() * 1_000_000)


def _step_back(texts: Sequence[str]) -> int:
    """The furthest in microseconds that a time lies before an earlier event's."""
    try:
        moments = [micros(text) for text in texts]
    except ValueError:
        raise Refused("an event's time is none") from None
    return max((max(moments[: at + 1]) - moment for at, moment in enumerate(moments)), default=0)


def events(case: Case) -> str:
    """What the statement says of the request, its version, its processes and its objects is what was recorded."""
    said, found = case.said, events_of(case)
    try:
        for event in found:
            _require_agreement(said, event)
        _require_processes(said, found)
        _destroyed(said, found)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("an event in the ledger does not hold what its kind holds") from None
    return f"request, versions, {len(said['replicas'])} processes and objects agree with {len(found)} events"


def _require_agreement(said: dict[str, Any], event: Event) -> None:
    body, after = event.body, said["after"]
    match event.kind:
        case "request.received":
            same = all(body[name] == said["request"][name] for name in ("kind", "subject_commitment"))
            require(same, "the ledger received another kind of request, or one about somebody else")
        case "target.deactivating":
            keys, recorded = {digest_of(entry["stage"]) for entry in said["tainted"]}, set(body["stages"])
            same = keys == recorded if said["outcome"] == "erased" else keys <= recorded
            require(same, "the ledger has other stages as tainted")
            require(body["version"] == after["version"], "the ledger deactivated by another version")
        case "version.published":
            same = (body["version"], body["assembly"]) == (after["version"], digest_of(after["assembly"]))
            require(same, "the ledger published another assembly under this version")
        case _:
            pass


def _require_processes(said: dict[str, Any], found: Sequence[Event]) -> None:
    told = {(event.kind, event.body["process_id"], event.time) for event in found if event.kind.startswith("replica.")}
    for row in said["replicas"]:
        kinds = {(kind, row["process_id"], row["at"]) for kind in REPLICA[row["how"]]}
        which = f"process {row['process_id']} {row['how'].replace('_', ' ')} then"
        require(told & kinds, f"no event in the ledger says that {which}")
        told -= kinds
    require(not told, "the ledger names a process that is not listed")


def _destroyed(said: dict[str, Any], found: Sequence[Event]) -> None:
    """Each destroyed object has its event, with its digest and the time of the first look."""
    told = {
        event.body["object_name"]: (event.body["digest"], micros(event.body["absent_at"]))
        for event in found
        if event.kind == "artifact.destroyed"
    }
    objects = [*said["payloads"], *(each for entry in said["tainted"] for each in entry["artifacts"])]
    for entry in objects:
        name, at = entry["object_name"], entry["destroyed_at"]
        if at is None or (name not in told and _may_be_erased(at, said)):
            continue
        require(
            told.get(name) == (entry["digest"], micros(at)),
            f"no event in the ledger says that {name} was destroyed then",
        )
    known = {entry["object_name"] for entry in objects}
    require(told.keys() <= known, "the ledger destroyed an object that is not listed")


def replicas(case: Case) -> str:
    """`deactivated` came after every process had acknowledged, ended or been fenced."""
    said = case.said
    deactivated = [entry["at"] for entry in said["times"] if entry["state"] == "deactivated"]
    require(deactivated, "never deactivated")
    for entry in said["replicas"]:
        who = entry["process_id"]
        require(
            micros(entry["at"]) <= micros(deactivated[0]) + said["clock_back_microseconds"],
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
