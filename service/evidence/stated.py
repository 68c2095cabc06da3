"""What a certificate claims, assumes and leaves open: worded and graded as version 2 allows, none missing."""

import re
from typing import Any

from service.evidence.form import ASSUMED, CLAIMS
from service.evidence.opening import Case, require

CLOCK_SLACK = 1_000_000
"""Microseconds by which a time may lie before that of an earlier event without being an open item."""


def claims(case: Case) -> str:
    """The claims are those that outcome and backbone allow, in the words of version 2, none overstated."""
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
        require(entry["statement"] == statement, f"{entry['claim']} is not worded as version 2 words it")
    texts = [
        text or ""
        for name in ("claims", "assumptions", "open_items")
        for entry in said[name]
        for text in entry.values()
    ]
    overstated = [text for text in texts if re.search(r"\b(prove|proof|guarantee)", text, re.IGNORECASE)]
    require(not overstated, "a text claims proof of what is only signed")
    return f"{', '.join(made)}; none overstated"


def assumptions(case: Case) -> str:
    """None is missing."""
    codes = [entry["code"] for entry in case.said["assumptions"]]
    require(sorted(codes) == sorted(ASSUMED), "the assumptions are not those of version 2")
    return f"{len(codes)} stated; read them"


def open_items(case: Case) -> str:
    """What the certificate itself shows to be open is named as open."""
    said, items = case.said, case.said["open_items"]
    unfreed = {entry["process_id"] for entry in said["replicas"] if not entry["freed"]}
    require(
        _named(items, "memory_release_not_confirmed") == unfreed,
        "the processes that did not confirm releasing memory are not those named as open",
    )
    for code in ("late_upload_sweeps", "backups"):
        needed = said["outcome"] == "erased"
        require(bool(_named(items, code)) == needed, f"{code} is {'not ' if needed else ''}named as open")
    back = said["clock_back_microseconds"] >= CLOCK_SLACK
    require(bool(_named(items, "clock_went_back")) == back, "a clock that went back is not named as open, or did not")
    keys = [(item["code"], item["name"]) for item in items]
    require(len(set(keys)) == len(keys), "an item is open twice")
    return "; ".join(_shown(item) for item in items) or "none"


def _named(items: list[dict[str, Any]], code: str) -> set[str]:
    return {item["name"] for item in items if item["code"] == code}


def _shown(item: dict[str, Any]) -> str:
    until = f", until {item['until'][:16]}" if item["until"] else ""
    return f"{item['code']} ({item['name']}{until})"
