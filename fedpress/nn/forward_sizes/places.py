"""Where a call stands in a module's forward code, in words that hold as long as that code stays."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

OURS = ("fedpress.nn.forward_sizes.", "fedpress.compress.")
"""Code between a module's forward and a call that is no part of the user's: it is left out of the place."""


@dataclass(frozen=True)
class Caller:
    """Who makes a call of a torch function: the module whose method does it, and where in the code."""

    module: nn.Module
    place: str


_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")


def caller(function: Callable[..., Any]) -> Caller | None:
    """Returns the module whose method makes the present call of `function`, and the place; None outside modules.

    The place names the call and, where helpers make it, the calls that lead to it from the module's own code.
    """
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    parts: list[str] = []
    inner: FrameType | None = (
        None  # a comprehension, which newer versions of Python run within its function
    )
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            if module is not None and owner is not module:
                break
            module = owner
        name = str(frame.f_globals.get("__name__", ""))
        if module is not None and name == nn.Module.__module__:  # which called the module's forward
            break
        ours = name.startswith(OURS)
        if not ours and (
            owner is module is not None or not name.startswith(("torch.", "contextlib"))
        ):
            if frame.f_code.co_name in _COMPREHENSIONS:
                inner = inner or frame
            else:
                parts.append(_part(frame.f_code, inner or frame))
                inner = None
        frame = frame.f_back
    if module is None:
        return None
    return Caller(module, " ".join([*reversed(parts), getattr(function, "__name__", "call")]))


_PARTS: dict[tuple[CodeType, CodeType, int], str] = {}


def _part(code: CodeType, at: FrameType) -> str:
    """Names the function of `code`, and the line within it and the column where the call in `at` ends."""
    key = code, at.f_code, at.f_lasti
    if key not in _PARTS:
        _, line, _, column = list(at.f_code.co_positions())[at.f_lasti // 2]
        # Lines count from the function's first, so that changes above it in the file do no harm.
        offset = (line or at.f_lineno) - code.co_firstlineno
        _PARTS[key] = (
            f"{os.path.basename(code.co_filename)}:{code.co_qualname}+{offset}:{column or 0}"
        )
    return _PARTS[key]


def has_place(module: nn.Module, place: str) -> bool:
    """Says whether the code of the module's class still has a call at `place`; True where that cannot be known."""
    first, *_ = place.split(" ")
    named, plus, rest = first.rpartition("+")
    if not plus:  # the index of a call, of an older file
        return True
    offset, _, column = rest.partition(":")
    known = [
        code
        for kind in type(module).__mro__
        for value in vars(kind).values()
        for code in _codes(
            getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        )
        if f"{os.path.basename(code.co_filename)}:{code.co_qualname}" == named
    ]
    if not known or column == "0":
        return True
    return any((int(offset), int(column)) in _ends(code) for code in known)


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """Yields the code of a function and of those that are defined in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _ends(code: CodeType) -> set[tuple[int, int]]:
    """Returns the line, from the function's first on, and the column where each of its operations ends."""
    first = code.co_firstlineno
    inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name in _COMPREHENSIONS]
    return {
        (line - first, column)
        for each in (code, *inner)
        for _, line, _, column in each.co_positions()
        if line is not None and column is not None
    }
