"""Rows of numbers as text: what may be ingested or asked is exactly what the engines can read."""

import json

import numpy as np
import numpy.typing as npt


class VectorError(ValueError):
    """Not a JSON array of so many finite numbers; the message holds none of them."""


def parsed(text: str | bytes, width: int) -> npt.NDArray[np.float32]:
    """The float32 numbers (width,) of a JSON array.

    Raises:
        VectorError: no such array, another width, or a number that float32 cannot hold.
    """
    try:
        body = json.loads(text)
        if isinstance(body, list) and len(body) == width and all(type(each) in {int, float} for each in body):
            with np.errstate(over="ignore"):
                row = np.array(body, np.float64).astype(np.float32)
            if np.isfinite(row).all():
                return row
    except (ValueError, OverflowError, RecursionError):
        pass  # below; the message must not hold the input
    raise VectorError(f"not a JSON array of {width} finite numbers; give one like [0.5, -1, 2e-3]")
