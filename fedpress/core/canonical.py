"""Converts settings and objects to canonical JSON, which is equal on server and client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""A value that JSON can hold."""


def canonical(value: Any) -> JSON:
    """Returns `value` as JSON without class names, so that classes may be renamed.

    Settings (pydantic models) and dataclasses become dictionaries of their fields; that of a
    dataclass also has its `kind`, if it has one. If an object has a method `agreed`, its result is
    converted instead: the values on which server and client must agree. A function is represented
    by its name.

    Raises:
        TypeError: if `value` or a value in it is of another type and no JSON value, is a lambda, or
            is a dictionary in which two keys have the same text, such as 1 and "1".

    >>> canonical((1, math.inf, b"key"))
    [1, 'inf', '6b6579']
    """
    if hasattr(value, "agreed") and not isinstance(value, type):
        return canonical(value.agreed())
    # JSON has no infinity and no NaN.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    entries = _entries(value)
    if entries is not None:
        return _table(entries)
    if callable(value) and hasattr(value, "__name__"):
        return _name(value)
    raise TypeError(f"{type(value).__name__} has no canonical JSON; give it a method `agreed`")


def _table(entries: Mapping[Any, Any]) -> dict[str, JSON]:
    table = {str(key): canonical(item) for key, item in entries.items()}
    if len(table) < len(entries):
        raise TypeError(f"two keys of {list(entries)} have the same text; give each its own")
    return table


def _name(function: Any) -> str:
    """Returns a function's name; a method's name includes its class, such as `Sgd.step`."""
    if function.__name__ == "<lambda>":
        raise TypeError(
            "all lambdas have the same name; define a function, or a class with a method `agreed`"
        )
    # The qualified name of an inner function contains the function around it, such as
    # `test_a.<locals>.f`. Only `f` is taken, because it may be defined elsewhere on the client.
    inner = "<locals>" in function.__qualname__
    return str(function.__name__ if inner else function.__qualname__)


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """Returns the entries of a dictionary, settings or a dataclass; None for other values."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if not is_dataclass(value) or isinstance(value, type):
        return None
    found: dict[Any, Any] = {}
    # Two classes may have the same fields; `kind` tells them apart.
    kind = getattr(value, "kind", None)
    if kind is not None:
        found["kind"] = kind
    return found | {field.name: getattr(value, field.name) for field in fields(value)}
