"""Closed forms: what a document may hold, member by member, checked before anything in it is read."""

import re
from datetime import datetime
from typing import Any

HEX = re.compile(r"[0-9a-f]{64}")
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OBJECT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")

# A dict is an object with exactly these members, a list holds any number of its one form, a tuple lists
# alternatives, a pattern matches a whole text, `str` is a text that is not empty, `int` a whole number
# from 0; anything else is itself.


def misfit(value: Any, shape: Any, where: str = "statement") -> str | None:
    """Where and how a value departs from its closed form; None if it does not."""
    if isinstance(shape, tuple):
        alike = [alternative for alternative in shape if isinstance(value, dict) and isinstance(alternative, dict)]
        found = [misfit(value, alternative, where) for alternative in alike or shape]
        return None if None in found else found[0]
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        parts = [(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        if odd := sorted(value.keys() ^ shape.keys()):
            return f"{where} {'lacks' if odd[0] in shape else 'has the unknown member'} {odd[0]!r}"
        parts = [(value[name], inner, f"{where}.{name}") for name, inner in shape.items()]
    elif not _is_leaf(value, shape):
        return f"{where} is not what its form allows there"
    return next((text for part in parts if (text := misfit(*part))), None)


def _is_leaf(value: Any, shape: Any) -> bool:
    if shape is int:
        return type(value) is int and value >= 0
    if shape is str:
        return isinstance(value, str) and bool(value)
    if isinstance(shape, re.Pattern):
        fits = isinstance(value, str) and bool(shape.fullmatch(value))
        return fits and (shape is not TIME or _is_moment(value))
    return type(value) is type(shape) and value == shape


def _is_moment(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:  # the 31st of February
        return False
    return True
