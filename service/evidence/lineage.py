"""What is served, derived again: stage keys from their inputs, ancestors included, and none of them tainted."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.evidence.opening import Case, require
from shards.digest import digest_of


def derive(assembly: Mapping[str, Any], listed: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every stage that an assembly stands on, by key: the keys are digests of the inputs listed, and none is left over.

    Raises:
        Refused: a key or an ancestor is not of the inputs listed, or an input is not used.
    """
    known = {digest_of(stage): stage for stage in listed}
    require(len(known) == len(listed), "a stage is listed twice")
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
    return known


def lineage(stage: Mapping[str, Any]) -> set[tuple[int, int, str]]:
    """The manifests that a stage read, as (shard, slice, root); its ancestors' are among them."""
    _well_formed(stage)
    return {(stage["shard"], s, r) for s, r in zip(stage["prefix"], stage["roots"], strict=True)}


def _well_formed(stage: Mapping[str, Any]) -> None:
    prefix = stage["prefix"]
    right = len(prefix) == len(stage["roots"]) == len(set(prefix)) > 0
    require(
        right and (stage["parent"] is None) == (len(prefix) == 1),
        "a stage's slices, roots and parent disagree",
    )


def touched(said: Mapping[str, Any]) -> set[tuple[int, int, str]]:
    """The manifests that a certificate calls touched."""
    return {(cell["shard"], cell["slice"], cell["root"]) for cell in said["touched"]}


def subject(case: Case) -> str:
    """The statement is about the assembly in it."""
    after = case.said["after"]
    digest = digest_of(after["assembly"])
    name = f"{case.said['model']['name']}@{after['version']}"
    require(
        case.statement["subject"] == [{"name": name, "digest": {"sha256": digest}}],
        f"the statement is not about {name} with the digest {digest[:12]} of the assembly in it",
    )
    return f"{name} is the assembly {digest[:12]}"


def stages(case: Case) -> str:
    """The keys in the assembly are digests of the inputs listed, ancestor by ancestor."""
    assembly = case.said["after"]["assembly"]
    require(assembly["recipe"] == case.said["model"]["recipe"], "the assembly was made with another recipe")
    known = derive(assembly, case.said["stages"])
    return f"{len(known)} keys derived from their inputs, ancestors included"


def influence(case: Case) -> str:
    """No served stage or ancestor read a touched manifest."""
    require_clean(case.said["stages"], case.said)
    count = len({cell["root"] for cell in case.said["touched"]})
    return f"{len(case.said['stages'])} served stages read none of {count} touched manifests"


def require_clean(served: Sequence[dict[str, Any]], said: Mapping[str, Any]) -> None:
    """None of the stages read a manifest that the certificate calls touched.

    By root alone: stricter than by cell, and no slip in a cell's number can hide a match.
    """
    roots = {cell["root"] for cell in said["touched"]}
    for stage in served:
        require(roots.isdisjoint(stage["roots"]), f"served stage {digest_of(stage)[:12]} read a touched manifest")


def tainted(case: Case) -> str:
    """Each stage called tainted read a touched manifest; none is served, nor its bytes under another key."""
    served = {digest_of(stage) for stage in case.said["stages"]}
    members = [member for member in case.said["after"]["assembly"]["members"] if member]
    served |= {member["stage"] for member in members}
    keys = [digest_of(entry["stage"]) for entry in case.said["tainted"]]
    require(len(set(keys)) == len(keys), "a tainted stage is listed twice")
    for key, entry in zip(keys, case.said["tainted"], strict=True):
        require(
            lineage(entry["stage"]) & touched(case.said),
            f"stage {key[:12]} is called tainted but read no touched manifest",
        )
        require(key not in served, f"tainted stage {key[:12]} is in the assembly")
    weights = {digest for member in members for digest in member["artifacts"]}
    bad = {artifact["digest"] for entry in case.said["tainted"] for artifact in entry["artifacts"]}
    require(weights.isdisjoint(bad), "the artefact of a tainted stage is served under another stage's key")
    return f"{len(keys)} stages, each with a touched manifest in its lineage, none served"


def platforms(case: Case) -> str:
    """Fingerprints are digests of the fields listed, and each served stage was trained on one of them."""
    return require_platforms(case.said["platforms"], {digest_of(stage) for stage in case.said["stages"]})


def require_platforms(rows: Sequence[Mapping[str, Any]], served: set[str]) -> str:
    """Do so for these platforms and stage keys."""
    for row in rows:
        fields = {entry["name"]: entry["value"] for entry in row["fields"]}
        require(len(fields) == len(row["fields"]), "a field of a platform is listed twice")
        require(digest_of(fields) == row["fingerprint"], f"fingerprint {row['fingerprint'][:12]} is of other fields")
        require(set(row["stages"]) <= served, f"platform {row['fingerprint'][:12]} names a stage that is not served")
    require(len({row["fingerprint"] for row in rows}) == len(rows), "a platform is listed twice")
    require({key for row in rows for key in row["stages"]} == served, "the platform of a served stage is not said")
    return f"{len(rows)} fingerprints derived from their fields; {len(served)} stages were trained on them"


def replays(case: Case) -> str:
    """Replays are of served artefacts, and none differed."""
    said = case.said
    members = [member for member in said["after"]["assembly"]["members"] if member]
    artifacts = {digest for member in members for digest in member["artifacts"]}
    served = {digest_of(stage) for stage in said["stages"]}
    for entry in said["replays"]:
        which = f"the replay of {entry['stage'][:12]}"
        require(entry["stage"] in served and entry["digest"] in artifacts, f"{which} is of nothing that is served")
        require(entry["outcome"] != "mismatch", f"{which} gave other bits: the stage should not be served")
        require(entry["at"] <= said["issuer"]["issued_at"], f"{which} was after the certificate")
        trained = entry["outcome"] in {"equal", "other_platform"}
        require((entry["platform"] is not None) == trained, f"{which} and its platform disagree")
    stages_replayed = [entry["stage"] for entry in said["replays"]]
    require(len(set(stages_replayed)) == len(stages_replayed), "a stage's replay is listed twice")
    equal = sum(entry["outcome"] == "equal" for entry in said["replays"])
    return f"{equal} of {len(served)} served stages were replayed with the same bits before the certificate"
