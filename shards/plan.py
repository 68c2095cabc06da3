"""The plan of a deletion and of a rebuild: pure functions of what is live and which records are out."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from shards.assembly import Assembly, Member
from shards.recipe import Recipe
from shards.stages import CellRoot, Stage, chain

Roots = Mapping[int, Mapping[int, str]]
"""Today's manifest roots: shard -> slice -> root."""


def tainted(stages: Iterable[Stage], touched: AbstractSet[CellRoot]) -> frozenset[str]:
    """Keys of the stages whose lineage holds a deleted or restricted record.

    `touched` are the manifests that contain such a record, today's and old ones.
    """
    return frozenset(stage.key for stage in stages if stage.lineage & touched)


def assemble(recipe: Recipe, live: Mapping[str, Stage], digests: Mapping[str, str], roots: Roots) -> Assembly:
    """The assembly that serves, given the clean stages alone: so a then b, b then a, or both at once agree.

    Per seat (a shard; of engine `ridge`, a cell) the longest prefix wins, then the one that lacks fewest of today's
    records (stale manifests), then the order's place in the recipe (stop-gap orders last), then the key. A stage stands
    only on live ancestors.

    Args:
        recipe: the model's.
        live: clean stages with a live artefact, by key.
        digests: artefact digest by stage key.
        roots: today's manifests.
    """
    orders = recipe.slice_orders
    rank = {
        tuple(order[:depth]): i for i, order in reversed(list(enumerate(orders))) for depth in range(1, len(order) + 1)
    }
    best: dict[int, tuple[tuple[int, int, int, str], Stage]] = {}
    for stage in live.values():
        if stage.recipe != recipe.digest or ancestry(stage, live) is None:
            continue
        current = roots[stage.shard]
        stale = sum(current[s] != root for s, root in zip(stage.prefix, stage.roots, strict=True))
        order = (-stage.depth, stale, rank.get(stage.prefix, len(orders)), stage.key)
        seat = recipe.seat(stage.shard, stage.prefix)
        if seat not in best or order < best[seat][0]:
            best[seat] = (order, stage)
    members = [_member(best[seat][1], live, digests) if seat in best else None for seat in range(recipe.seats)]
    return Assembly(recipe.digest, tuple(members), recipe.rule)


def ancestry(stage: Stage, live: Mapping[str, Stage]) -> tuple[Stage, ...] | None:
    """The stage and its ancestors, shortest prefix first; None where one of them is not live."""
    line = [stage]
    while (parent := line[-1].parent) is not None:
        if parent not in live:
            return None
        line.append(live[parent])
    return tuple(reversed(line))


def _member(stage: Stage, live: Mapping[str, Stage], digests: Mapping[str, str]) -> Member:
    line = ancestry(stage, live) or ()
    return Member(stage.key, stage.prefix, tuple(digests[ancestor.key] for ancestor in line))


def missing(recipe: Recipe, roots: Roots, have: AbstractSet[str]) -> tuple[Stage, ...]:
    """Stages to train for full depth of every order on today's manifests, parents before children.

    `have` are the keys that are live or already queued.
    """
    wanted = (
        stage
        for shard in sorted(roots)
        for order in recipe.slice_orders
        for stage in chain(recipe.digest, shard, order, roots[shard])
    )
    return tuple(dict.fromkeys(stage for stage in wanted if stage.key not in have))


def canonical(assembly: Assembly, recipe: Recipe, roots: Roots) -> bool:
    """Whether the assembly is the one that training everything from nothing on today's manifests would serve."""
    first = recipe.slice_orders if recipe.engine == "ridge" else recipe.slice_orders[:1]
    wanted = {recipe.seat(shard, order): (shard, order) for shard in roots for order in first}
    if any(m is None or m.prefix != wanted[seat][1] for seat, m in enumerate(assembly.members)):
        return False  # without a digest: a deactivation mostly ends here, and is waited for
    return all(
        member is not None and member.stage == chain(recipe.digest, shard, order, roots[shard])[-1].key
        for member, (shard, order) in zip(assembly.members, (wanted[seat] for seat in sorted(wanted)), strict=True)
    )
