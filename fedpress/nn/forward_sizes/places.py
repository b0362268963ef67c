"""Names the place of a call in forward code: `file:function+line:column operation`.

The name is the same in every run of the same code, so that it can be stored in a file.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

MODULES_OF_FEDPRESS = ("fedpress.nn.forward_sizes.", "fedpress.compress.")
"""Beginnings of the names of Python modules that are never part of a place.

Their functions run between a user's code and torch.
"""


@dataclass(frozen=True)
class CallSite:
    """A call of a torch function.

    Attributes:
        module: the `nn.Module` whose method makes the call.
        place: name of the place in the code, as the docstring of this file describes it.
    """

    module: nn.Module
    place: str


_COMPREHENSION_NAMES = ("<listcomp>", "<setcomp>", "<dictcomp>")


def find_call_site(function: Callable[..., Any]) -> CallSite | None:
    """Finds the module and the place of the current call of `function`, from the call stack.

    If the module's code calls the torch function by helper functions, the place also names the
    calls of the helpers, beginning with the call in the module's code. Returns None if no module is
    on the call stack.
    """
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    parts: list[str] = []
    # Since Python 3.12 a comprehension runs in the frame of its function. In older versions it has
    # a frame of its own. To get the same name, the line is taken from that frame and the function
    # name from the enclosing one.
    comprehension: FrameType | None = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            if module is not None and owner is not module:
                break  # the module around it, which called this one
            module = owner

        name = str(frame.f_globals.get("__name__", ""))
        if module is not None and name == nn.Module.__module__:
            break  # `nn.Module.__call__`, which called the module's forward
        if _belongs_to_place(name, is_method=owner is module is not None):
            if frame.f_code.co_name in _COMPREHENSION_NAMES:
                comprehension = comprehension or frame
            else:
                parts.append(_name_of_call(frame.f_code, comprehension or frame))
                comprehension = None
        frame = frame.f_back

    if module is None:
        return None
    parts.reverse()
    parts.append(getattr(function, "__name__", "call"))
    return CallSite(module, " ".join(parts))


def _belongs_to_place(code_module: str, *, is_method: bool) -> bool:
    """Returns whether a frame of the call stack is part of the place.

    User code is part of it. Code of torch and `contextlib` is not, except the methods of the module
    itself. Code of `MODULES_OF_FEDPRESS` never is.

    Args:
        code_module: name of the Python module of the frame's code.
        is_method: whether the frame runs a method of the `nn.Module`.
    """
    if code_module.startswith(MODULES_OF_FEDPRESS):
        return False
    return is_method or not code_module.startswith(("torch.", "contextlib"))


_NAMES_OF_CALLS: dict[tuple[CodeType, CodeType, int], str] = {}
"""Cache of names: computing one is slow, and corrections need them in every forward pass."""


def _name_of_call(code: CodeType, at: FrameType) -> str:
    """Returns `file:function+line:column` of the call that runs in the frame `at`.

    The column is where the call ends. The line counts from the function's first line, so that
    changes above the function do not matter.
    """
    key = code, at.f_code, at.f_lasti
    if key not in _NAMES_OF_CALLS:
        # `f_lasti` counts bytes, and an instruction has two.
        _, line, _, column = list(at.f_code.co_positions())[at.f_lasti // 2]
        offset = (line or at.f_lineno) - code.co_firstlineno
        _NAMES_OF_CALLS[key] = f"{_function_name(code)}+{offset}:{column or 0}"
    return _NAMES_OF_CALLS[key]


def _function_name(code: CodeType) -> str:
    return f"{os.path.basename(code.co_filename)}:{code.co_qualname}"


def has_place(module: nn.Module, place: str) -> bool:
    """Returns whether the code of the module's class has a call at `place`.

    If that cannot be determined, the result is True.
    """
    first, *_ = place.split(" ")
    function_name, plus, rest = first.rpartition("+")
    if not plus:  # the index of a call, in a file of an older version
        return True
    offset, _, column = rest.partition(":")
    codes = []
    for code in _codes_of_class(type(module)):
        if _function_name(code) == function_name:
            codes.append(code)
    # Helper functions outside of the class cannot be checked. Column 0 means an unknown column.
    if not codes or column == "0":
        return True
    end = int(offset), int(column)
    return any(end in _ends_of_operations(code) for code in codes)


def _codes_of_class(kind: type) -> Iterator[CodeType]:
    """Yields the code of all methods of a class, and of the functions defined in them."""
    for base in kind.__mro__:
        for value in vars(base).values():
            if callable(value):
                yield from _codes(getattr(inspect.unwrap(value), "__code__", None))


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """Yields the code of a function and of the functions defined in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _ends_of_operations(code: CodeType) -> set[tuple[int, int]]:
    """Returns (line, column) of the end of each operation of a function; its first line is 0."""
    # Comprehensions count as part of their function, as in `find_call_site`.
    codes = [code]
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant.co_name in _COMPREHENSION_NAMES:
            codes.append(constant)
    ends = set()
    for each in codes:
        for _, line, _, column in each.co_positions():
            if line is not None and column is not None:
                ends.add((line - code.co_firstlineno, column))
    return ends
