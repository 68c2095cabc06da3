"""How the answers of the shards become one: the same lines for what is served and what is previewed."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]
"""(inputs, classes)."""


def mean_of_logits(members: Sequence[Logits]) -> Logits:
    """Mean over the live shards' logits, (n, classes) each, given in the order of their shards.

    Summed one by one in float64 and rounded once, so equal parts give equal bits wherever the mean is taken.

    Raises:
        ValueError: no live shard; there is nothing to answer from.
    """
    if not members:
        raise ValueError("no live shard: nothing may answer until a stage is rebuilt")
    total = np.zeros(members[0].shape, np.float64)
    for logits in members:
        total += logits
    return (total / len(members)).astype(np.float32)
