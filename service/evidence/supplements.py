"""Supplements to a certificate: each is about it, follows the one before, and says what became of its open ends."""

from collections.abc import Sequence
from typing import Any

from service.evidence.course import OPENINGS_KEPT, events_of, head_of, micros
from service.evidence.holdings import examine, require_lacking
from service.evidence.lineage import derive, require_clean, require_platforms
from service.evidence.log_check import Event, continues, unhex
from service.evidence.opening import OPENING, Case, Refused, require
from shards.digest import canonical, digest_of, sha256_hex

MONTH = round(OPENINGS_KEPT.total_seconds() * 1_000_000)


def check_supplement(case: Case, supplements: Sequence[Case], at: int) -> str:
    """Everything about the supplement at this place, and that it continues the ones before.

    Raises:
        Refused: the first thing that does not hold.
    """
    mine = supplements[at]
    for name, _, step in OPENING:
        try:
            step(mine)
        except Refused as refusal:
            raise Refused(f"{name}: {refusal}") from None
    about(case, supplements, at)
    found = events_of(mine)
    try:
        _issued(case, mine, found)
        done = [*_sweeps(case, mine, found), *_processes(case, mine, found), *_exports(case, mine, found)]
        done += [*_rebuild(case, mine, found), *_lifted(case, mine, found)]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Refused("an event in the ledger does not hold what its kind holds") from None
    require(done, "it adds nothing")
    return f"of {mine.said['issuer']['issued_at'][:16]}: {'; '.join(done)}"


def about(case: Case, supplements: Sequence[Case], at: int) -> None:
    """It names the certificate and the supplement before, and its tree head continues theirs."""
    said, before = supplements[at].said, supplements[at - 1] if at else case
    digest = sha256_hex(canonical(case.envelope))
    require(said["certificate"] == digest, f"it is about the certificate {said['certificate'][:12]}, not {digest[:12]}")
    subjects = [each["digest"]["sha256"] for each in supplements[at].statement["subject"]]
    require(subjects == [digest], "its subject is not the certificate")
    require(said["number"] == at + 1, f"it has number {said['number']}, and {at + 1} is due: one is missing or twice")
    previous = sha256_hex(canonical(before.envelope)) if at else None
    require(said["previous"] == previous, "it does not follow the supplement before")
    same = (said["request"], said["model"]) == (case.said["request"]["id"], case.said["model"]["name"])
    require(same, "it is of another request or model")
    require(before.statement, "the supplement before did not open")
    old, new = head_of(before), head_of(supplements[at])
    require(old.origin == new.origin, f"it is of the log {new.origin}, and the statement before of {old.origin}")
    path = unhex(said["ledger"]["consistency"])
    require(continues(old, new, path), f"FORK: {old} and {new} are not of one ledger: keep both, and ask the operator")
    require(
        micros(before.said["issuer"]["issued_at"]) <= micros(said["issuer"]["issued_at"]) + _slack(case),
        "it is older than the statement before",
    )


def _slack(case: Case) -> int:
    return case.said["clock_back_microseconds"] + 1_000_000


def _issued(case: Case, mine: Case, found: Sequence[Event]) -> None:
    """The certificate's issue is in the ledger, as long as that can be shown."""
    digest = mine.said["certificate"]
    if any(event.kind == "certificate.issued" and event.body["digest"] == digest for event in found):
        return
    age = micros(mine.said["issuer"]["issued_at"]) - micros(case.said["issuer"]["issued_at"])
    require(age > MONTH, "no event in the ledger says that the certificate was issued")


def _sweeps(case: Case, mine: Case, found: Sequence[Event]) -> list[str]:
    objects = [*case.said["payloads"], *(each for entry in case.said["tainted"] for each in entry["artifacts"])]
    names = {entry["object_name"] for entry in objects}
    told = {event.body["object_name"] for event in found if event.kind == "artifact.reappeared"}
    again: set[str] = set()
    for row in mine.said["sweeps"]:
        require(row["objects"] == len(names), f"sweep {row['sweep']} did not look for all objects of the certificate")
        require(set(row["reappeared"]) <= names, f"sweep {row['sweep']} found an object that is not the certificate's")
        require(row["absent_at"] <= mine.said["issuer"]["issued_at"], f"sweep {row['sweep']} was after the supplement")
        again |= set(row["reappeared"])
    require(told == again, "the ledger has other objects that had appeared again")
    return [
        f"sweep {row['sweep']}: {row['objects']} objects absent, {len(row['reappeared'])} destroyed again"
        for row in mine.said["sweeps"]
    ]


def _processes(case: Case, mine: Case, found: Sequence[Event]) -> list[str]:
    open_ones = {i["name"] for i in case.said["open_items"] if i["code"] == "memory_release_not_confirmed"}
    kinds = {"ended": "replica.ended", "fenced_by_expiry": "replica.fenced"}
    for row in mine.said["processes"]:
        who, kind = row["process_id"], kinds.get(row["how"])
        require(who in open_ones, f"process {who} was not open")
        told = any(event.kind == kind and event.body["process_id"] == who for event in found)
        require(kind is None or told, f"no event in the ledger says that process {who} {row['how'].replace('_', ' ')}")
    return [f"process {row['process_id'][:8]} {row['how'].replace('_', ' ')}" for row in mine.said["processes"]]


def _exports(case: Case, mine: Case, found: Sequence[Event]) -> list[str]:
    open_ones = {i["name"] for i in case.said["open_items"] if i["code"] == "export_not_withdrawn"}
    told = {event.body["export_id"] for event in found if event.kind == "export.withdrawn"}
    for row in mine.said["exports"]:
        require(row["export_id"] in open_ones, f"export {row['export_id']} was not open")
        require(row["export_id"] in told, f"no event in the ledger withdraws export {row['export_id']}")
    return [f"export {row['export_id'][:8]} withdrawn" for row in mine.said["exports"]]


def _rebuild(case: Case, mine: Case, found: Sequence[Event]) -> list[str]:
    """The rebuilt assembly is held to what the certificate's was."""
    new: dict[str, Any] | None = mine.said["rebuild"]
    if new is None:
        return []
    require(new["version"] > case.said["after"]["version"], "the version rebuilt is not later than the certificate's")
    require(new["assembly"]["recipe"] == case.said["model"]["recipe"], "it was rebuilt with another recipe")
    known = derive(new["assembly"], new["stages"])
    require_clean(new["stages"], case.said)
    require_platforms(new["platforms"], set(known))
    holds, lacks = examine(new["manifests"])
    require(not any(holds.values()), "a manifest of the rebuilt version holds one of the records")
    require_lacking(new["stages"], case.said["records"], lacks)
    digest = digest_of(new["assembly"])
    told = (new["version"], digest, new["published_at"])
    published = [event for event in found if event.kind == "version.published"]
    require(
        told in [(event.body["version"], event.body["assembly"], event.time) for event in published],
        "no event in the ledger publishes the rebuilt assembly",
    )
    return [f"version {new['version']} rebuilt: {len(known)} stages derived, none read a record"]


def _lifted(case: Case, mine: Case, found: Sequence[Event]) -> list[str]:
    """A restriction was ended: what the certificate says of its version stands, but the records serve again."""
    said: dict[str, Any] | None = mine.said["lifted"]
    if said is None:
        return []
    require(case.said["outcome"] == "restricted", "only a restriction can be lifted")
    told = [(event.time, event.body["version"]) for event in found if event.kind == "target.lifted"]
    require((said["at"], said["version"]) in told, "no event in the ledger lifts the restriction then")
    return [f"the restriction was LIFTED at {said['at'][:16]}: its records may serve again"]
