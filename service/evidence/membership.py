"""Merkle paths over a cell's manifest: that it holds a commitment, or that it lacks it.

A manifest's leaves are sorted, so a commitment that it lacks would lie between two neighbours. A path shows neighbours'
commitments and hashes of others. These commit to record id and content under a random salt of each record's own, which
lies in the payload file alone: whoever holds no payload learns nothing from them but how many records a cell has.
"""

from bisect import bisect_left
from typing import Any

from service.evidence.rows import EvidenceError, ManifestRow, RecordRow
from shards.merkle import leaf_hash, node_hash, root


class Paths:
    """The tree of one manifest."""

    def __init__(self, manifest: ManifestRow) -> None:
        """Hashes every commitment: two hashes a record."""
        self._commitments = manifest.commitments
        self._levels = [[leaf_hash(each) for each in manifest.commitments]]
        while len(self._levels[-1]) > 1:
            below = self._levels[-1]
            level = [node_hash(*pair) for pair in zip(below[::2], below[1::2], strict=False)]
            self._levels.append(level + below[len(below) & ~1 :])  # an odd last one is carried up

    @property
    def root(self) -> str:
        """The root that the commitments give."""
        return self._levels[-1][0].hex() if self._commitments else root([]).hex()

    def holds(self, commitment: bytes) -> bool:
        """Whether the manifest holds it."""
        at = bisect_left(self._commitments, commitment)
        return at < len(self._commitments) and self._commitments[at] == commitment

    def place(self, commitment: bytes) -> dict[str, Any]:
        """Where a commitment that it holds lies, with its siblings from the leaf up."""
        return self._at(bisect_left(self._commitments, commitment))

    def gap(self, commitment: bytes) -> dict[str, Any]:
        """Between which neighbours a commitment that it lacks would lie."""
        at = bisect_left(self._commitments, commitment)
        return {
            "commitment": commitment.hex(),
            "before": self._at(at - 1) if at > 0 else None,
            "after": self._at(at) if at < len(self._commitments) else None,
        }

    def _at(self, index: int) -> dict[str, Any]:
        path: list[str] = []
        place = index
        for level in self._levels[:-1]:
            if place ^ 1 < len(level):
                path.append(level[place ^ 1].hex())
            place >>= 1
        return {"commitment": self._commitments[index].hex(), "index": index, "path": path}


def show(manifest: ManifestRow, records: tuple[RecordRow, ...]) -> dict[str, Any]:
    """A manifest with a path for each record of its cell: that it is held, or lacking.

    Raises:
        EvidenceError: the commitments are not what the root says.
    """
    paths = Paths(manifest)
    if paths.root != manifest.root:
        raise EvidenceError(f"manifest {manifest.root[:12]} is not what the records give: a table was changed by hand")
    here = sorted({r.commitment for r in records if (r.shard, r.slice) == (manifest.shard, manifest.slice)})
    return {
        "shard": manifest.shard,
        "slice": manifest.slice,
        "root": manifest.root,
        "rows": len(manifest.commitments),
        "holds": [paths.place(each) for each in here if paths.holds(each)],
        "lacks": [paths.gap(each) for each in here if not paths.holds(each)],
    }
