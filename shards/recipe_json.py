"""Recipes as JSON: strict reading that names the field, and back."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from shards.errors import RecipeError

T = TypeVar("T")


def plain(value: Any) -> Any:
    """The value with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def read(cls: type[T], body: Any, where: str) -> T:
    """An instance of the dataclass `cls` from a JSON object; `where` is its path in messages.

    Raises:
        RecipeError: an unknown, missing or ill-typed field, by name.
    """
    if not isinstance(body, Mapping):
        raise RecipeError(f"{where} must be an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(body) - set(hints)):
        raise RecipeError(f"{where} has no field {unknown[0]!r}; it has {', '.join(sorted(hints))}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in body.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}") from None


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is types.UnionType:  # only ever "X | None"
        return None if value is None else _value(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return read(typing.cast("type[Any]", hint), value, where)
    if origin is tuple:
        return _items(typing.get_args(hint)[0], value, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise RecipeError(f"{where} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    elif origin is not None:
        if not isinstance(value, dict):
            raise RecipeError(f"{where} must be an object")
    else:
        value = _scalar(hint, value, where)
    return value


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise RecipeError(f"{where} must be of type float, which ends at 1.8e308") from None
    if type(value) is not hint:
        raise RecipeError(f"{where} must be of type {hint.__name__}, not {value!r}")
    return value


def _items(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    if hint is str:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise RecipeError(f"{where} must be a list of strings")
        return tuple(value)
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{where} must be a list")
    return tuple(_value(hint, item, f"{where}[{place}]") for place, item in enumerate(value))
