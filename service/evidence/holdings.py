"""Which manifests held the records and which lack them, by Merkle paths (RFC 6962, section 2.1.1).

The leaves of a manifest are sorted commitments, so one that is lacking would lie between two neighbours: next to each
other, at the left end, or at the right end. The shape of two paths alone shows that their leaves are neighbours,
whatever number of rows is claimed. That the leaves are sorted is the assumption `manifests`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from service.evidence.lineage import lineage, touched
from service.evidence.log_check import root_above, unhex
from service.evidence.opening import Case, require
from shards.digest import digest_of
from shards.merkle import leaf_hash, root

Place = tuple[int, int, str]
"""Shard, slice and root."""


def _require_at(place: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """The commitment lies at that index under the manifest's root."""
    leaf = leaf_hash(bytes.fromhex(place["commitment"]))
    found = root_above(leaf, place["index"], manifest["rows"], unhex(place["path"]))
    where = f"manifest {manifest['root'][:12]}"
    require(
        found is not None and found.hex() == manifest["root"],
        f"{place['commitment'][:12]} does not lie at {place['index']} in {where}",
    )


def _require_gap(gap: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    """The commitment would lie between two neighbours that do lie there."""
    before, after, rows = gap["before"], gap["after"], manifest["rows"]
    which = f"that manifest {manifest['root'][:12]} lacks {gap['commitment'][:12]}"
    if before is None and after is None:
        require(rows == 0 and manifest["root"] == root([]).hex(), f"nothing shows {which}")
        return
    for place in (before, after):
        if place is not None:
            _require_at(place, manifest)
    first = after["index"] if after else rows
    last = before["index"] if before else -1
    require(last + 1 == first, f"the neighbours do not lie side by side, which should show {which}")
    require(before is None or before["commitment"] < gap["commitment"], f"the neighbour before does not show {which}")
    require(after is None or gap["commitment"] < after["commitment"], f"the neighbour after does not show {which}")


def examine(manifests: Sequence[Mapping[str, Any]]) -> tuple[dict[Place, set[str]], dict[Place, set[str]]]:
    """By manifest: the commitments that it is shown to hold, and those that it is shown to lack.

    Raises:
        Refused: a path does not lead to the manifest's root.
    """
    holds: dict[Place, set[str]] = {}
    lacks: dict[Place, set[str]] = {}
    for manifest in manifests:
        place = (manifest["shard"], manifest["slice"], manifest["root"])
        require(place not in holds, f"manifest {manifest['root'][:12]} is listed twice")
        for each in manifest["holds"]:
            _require_at(each, manifest)
        for each in manifest["lacks"]:
            _require_gap(each, manifest)
        holds[place] = {each["commitment"] for each in manifest["holds"]}
        lacks[place] = {each["commitment"] for each in manifest["lacks"]}
    return holds, lacks


def require_lacking(
    served: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], lacks: Mapping[Place, set[str]]
) -> int:
    """How many manifests served stages read in the records' cells: each is shown to lack all records of its cell.

    Raises:
        Refused: one of them is not.
    """
    shown = 0
    for place in {each for stage in served for each in lineage(stage)}:
        here = {record["commitment"] for record in records if (record["shard"], record["slice"]) == place[:2]}
        require(
            here <= lacks.get(place, set()), f"nothing shows that served manifest {place[2][:12]} lacks the records"
        )
        shown += bool(here)
    return shown


def records(case: Case) -> str:
    """The manifests called touched fit the records and the cells written again."""
    said, found = case.said, touched(case.said)
    for name in ("record_id", "commitment"):
        different = {record[name] for record in said["records"]}
        require(len(different) == len(said["records"]), f"the {name}s do not add up")
    require(found or not said["records"], "records, but no manifest that held them")
    require(len(found) == len(said["touched"]), "a touched manifest is listed twice")
    require(root([]).hex() not in {cell["root"] for cell in said["touched"]}, "the empty manifest held no record")
    homes = {(record["shard"], record["slice"]) for record in said["records"]}
    require({place[:2] for place in found} == homes, "the touched manifests are not of the cells of the records")
    for cell in said["cells"]:
        place = (cell["shard"], cell["slice"])
        require((*place, cell["before"]) in found, f"cell {place} was written again, but was not touched before")
        require((*place, cell["after"]) not in found, f"cell {place} is still touched afterwards")
    rewritten = {(cell["shard"], cell["slice"]) for cell in said["cells"]}
    needed = homes if said["outcome"] == "erased" else set()
    require(rewritten == needed, "the cells written again are not those that the touched manifests are of")
    return f"{len(said['records'])} records in {len(found)} manifests; {len(rewritten)} cells written again"


def membership(case: Case) -> str:
    """Each record, each tainted stage and each cell before is shown by a path to have held what was taken out."""
    said = case.said
    holds, _ = examine(said["manifests"])
    held = set().union(*holds.values()) if holds else set[str]()
    require({place for place, here in holds.items() if here} <= touched(said), "a manifest held a record untouched")
    for record in said["records"]:
        here = {c for place, found in holds.items() if place[:2] == (record["shard"], record["slice"]) for c in found}
        require(record["commitment"] in here, f"nothing shows that record {record['record_id']} lay in its cell")
    require(held <= {record["commitment"] for record in said["records"]}, "a path is of another record")
    for entry in said["tainted"]:
        require(
            any(holds.get(place) for place in lineage(entry["stage"])),
            f"nothing shows that tainted stage {digest_of(entry['stage'])[:12]} read one of the records",
        )
    for cell in said["cells"]:
        place = (cell["shard"], cell["slice"], cell["before"])
        require(holds.get(place), f"nothing shows that cell {place[:2]} held a record before")
    return f"{len(held)} records under {sum(map(bool, holds.values()))} roots, tainted stages and cells before included"


def non_membership(case: Case) -> str:
    """Cells afterwards, and what served stages read of the records' cells, are shown to lack the records."""
    said = case.said
    _, lacks = examine(said["manifests"])
    known = {record["commitment"] for record in said["records"]}
    require(all(each <= known for each in lacks.values()), "a path is of another record")
    for cell in said["cells"]:
        place = (cell["shard"], cell["slice"])
        here = {record["commitment"] for record in said["records"] if (record["shard"], record["slice"]) == place}
        require(here <= lacks.get((*place, cell["after"]), set()), f"nothing shows that cell {place} lacks the records")
    shown = require_lacking(said["stages"], said["records"], lacks)
    return f"{len(said['cells'])} cells afterwards and {shown} served manifests lack the records of their cells"
