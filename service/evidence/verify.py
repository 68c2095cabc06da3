"""Check a deletion certificate offline, with nothing but the file and the operator's public key.

Written to be read by an auditor: it shares only hash functions with the writer, opens no connection, and
takes nothing in the certificate for granted that can be derived again. What the operator's signature alone
carries is said in each check's `strength`. In the order of the lines: `form` and `shape` are the closed form,
`opening` unpacks it, `lineage` derives what is served, `holdings` follows Merkle paths into manifests, `course` and
`log_check` hold it against the ledger, `destruction` looks for what should be gone, `stated` reads what is claimed,
`supplements` and `later` follow what came after. docs/certificate.md says what the fields mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.evidence import course, destruction, holdings, lineage, stated
from service.evidence.form import OFFLINE, REDERIVED, SIGNED, SUPPLEMENT
from service.evidence.later import Later, check_later
from service.evidence.opening import OPENING, Case, Refused, Step, Trusted, read_json
from service.evidence.supplements import check_supplement

__all__ = ["Check", "Later", "Trusted", "read_json", "verify"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the result."""

    name: str
    passed: bool
    detail: str
    strength: str
    """What the line rests on when it passed."""


CONTENT: tuple[Step, ...] = (
    ("subject", REDERIVED, lineage.subject),
    ("stages", REDERIVED, lineage.stages),
    ("platforms", REDERIVED, lineage.platforms),
    ("influence-free", REDERIVED, lineage.influence),
    ("tainted stages", REDERIVED, lineage.tainted),
    ("records and cells", OFFLINE, holdings.records),
    ("membership", REDERIVED, holdings.membership),
    ("non-membership", REDERIVED, holdings.non_membership),
    ("replays", SIGNED, lineage.replays),
    ("versions", SIGNED, course.versions),
    ("tree head", SIGNED, course.tree_head),
    ("ledger entries", REDERIVED, course.entries),
    ("events", OFFLINE, course.events),
    ("times", SIGNED, course.times),
    ("replicas", SIGNED, course.replicas),
    ("destruction", SIGNED, destruction.destruction),
    ("claims", OFFLINE, stated.claims),
    ("assumptions", OFFLINE, stated.assumptions),
    ("open items", SIGNED, stated.open_items),
)


def verify(
    envelope: Mapping[str, Any],
    keys: bytes | Sequence[Trusted],
    *,
    supplements: Sequence[Mapping[str, Any]] = (),
    later: Sequence[Later] = (),
    artifacts: Path | None = None,
    file_keys: Path | None = None,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Check]:
    """Every check in order; the certificate holds if all passed. Nothing is read of one that does not open.

    Args:
        envelope: the certificate file, parsed by `read_json`.
        keys: the operator's key (PEM), or its keys, from somewhere else than the certificate.
        supplements: the certificate's supplements in their order, parsed alike.
        later: tree heads that the certificate's must agree with.
        artifacts: the artefact store's directory, to look for what should be gone.
        file_keys: the key store's directory, likewise.
        on_bytes: called with the bytes hashed so far and all there are.
    """
    trusted = [Trusted(keys)] if isinstance(keys, bytes) else list(keys)
    case = Case(envelope, trusted)
    checks: list[Check] = []
    for name, strength, step in OPENING:
        checks.append(_run(name, strength, step, case))
        if not checks[-1].passed:
            return checks
    steps = list(CONTENT)
    added = [Case(each, trusted, SUPPLEMENT) for each in supplements]
    steps += [(f"supplement {at + 1}", SIGNED, _supplement(added, at)) for at in range(len(added))]
    steps += [("later tree head", REDERIVED, _later(each)) for each in later]
    if artifacts is not None:
        store = artifacts
        steps.append(("artefact directory", OFFLINE, lambda c: destruction.directory_check(c, store, on_bytes)))
    if file_keys is not None:
        key_store = file_keys
        steps.append(("key store", OFFLINE, lambda c: destruction.keys_check(c, key_store)))
    return [*checks, *(_run(name, strength, step, case) for name, strength, step in steps)]


def _supplement(added: Sequence[Case], at: int) -> Callable[[Case], str]:
    return lambda case: check_supplement(case, added, at)


def _later(later: Later) -> Callable[[Case], str]:
    return lambda case: check_later(case, later)


def _run(name: str, strength: str, step: Callable[[Case], str], case: Case) -> Check:
    try:
        return Check(name, passed=True, detail=step(case), strength=strength)
    except Refused as refusal:
        return Check(name, passed=False, detail=str(refusal), strength=strength)
