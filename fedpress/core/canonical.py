"""Values as JSON by which two sides can see that they hold the same, whatever their classes are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


def canonical(value: Any) -> JSON:
    """Returns `value` as JSON that names no class, so that a class may be renamed.

    Of settings and dataclasses it takes the fields, and the `kind` where the class has one. A class whose fields are
    not what must be alike says so by a method `agreed`, which returns a table. A function is known by its name, so it
    must have one of its own.

    Raises:
        TypeError: if it is something of which nobody knows what must be alike, or two keys of a table have one name.

    >>> canonical((1, math.inf, b"key"))
    [1, 'inf', '6b6579']
    """
    if hasattr(value, "agreed") and not isinstance(value, type):
        return canonical(value.agreed())
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
        raise TypeError(f"two keys of {list(entries)} have one name; give each its own")
    return table


def _name(function: Any) -> str:
    """Returns the name of a function, of a method with that of its class: two classes may have one of equal name."""
    if function.__name__ == "<lambda>":
        raise TypeError(
            "all lambdas have one name; define a function, or a class with a method `agreed`"
        )
    inner = "<locals>" in function.__qualname__
    return str(function.__name__ if inner else function.__qualname__)


def _entries(value: Any) -> Mapping[Any, Any] | None:
    """Returns what a table, settings or a dataclass hold by name; None of anything else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, BaseModel):
        return {name: getattr(value, name) for name in type(value).model_fields}
    if not is_dataclass(value) or isinstance(value, type):
        return None
    kind = getattr(value, "kind", None)
    named = {} if kind is None else {"kind": kind}
    return named | {one.name: getattr(value, one.name) for one in fields(value)}
