"""What was computed of an input already, for an answer that a newer version overtook: only what changed runs again."""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from shards.logits import Logits

Known = dict[Hashable, Logits]
"""Of one input the logits (outputs,) of parts of an assembly. Derived from the input: it goes with it."""


def completed(
    parts: Sequence[Hashable],
    known: Sequence[Known],
    compute: Callable[[Sequence[int], Sequence[int]], Sequence[Logits]],
) -> list[Logits]:
    """Per part its logits (inputs, outputs): what is known, and what is not from `compute`, kept in `known`.

    To the same bits as if nothing were known, since an answer's bits depend on its own input and part alone. What
    other parts made is forgotten.

    Args:
        parts: what speaks in the assembly, each named by what it was trained on (`shards.assembly.Member`).
        known: one per input.
        compute: from the places of inputs and of parts, per part its logits (inputs, outputs).
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, own in enumerate(known):
        alike.setdefault(tuple(place for place, part in enumerate(parts) if part not in own), []).append(row)
    for missing, rows in alike.items():
        for place, logits in zip(missing, compute(rows, missing) if missing else (), strict=True):
            for row, answer in zip(rows, logits, strict=True):
                known[row][parts[place]] = answer
    for own in known:
        for gone in own.keys() - set(parts):
            del own[gone]
    return [np.stack([own[part] for own in known]) for part in parts]
