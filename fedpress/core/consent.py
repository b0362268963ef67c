"""Keeps the user's consent: a function named in a file is called only if the user allows it.

Example: a saved model says `architecture = "nets:Small"`. Loading it calls `nets.Small`, so whoever
wrote the file could run any function. A recipe may name a data source in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fedpress.errors import Argument, ModelError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`package.module:function`; the function is an attribute of the module itself, without a dot."""

_for_the_process: set[str] = set()
# A ContextVar, so that consent for a block does not hold in threads that run at the same time.
_for_the_block: ContextVar[frozenset[str]] = ContextVar("fedpress_consent", default=frozenset())


def allow(*names: str) -> None:
    """Allows files to name these functions, until the process ends.

    Call it for functions that the user has named elsewhere: in a recipe (the TOML file of a run) as
    `architecture = "module:function"`, or on the command line as a MODEL.

    Raises:
        ModelError: if a name is no `package.module:function`.
    """
    _for_the_process.update(checked(names))


def withdraw() -> frozenset[str]:
    """Undoes all calls of `allow` in this process, and returns the names that were allowed."""
    before = frozenset(_for_the_process)
    _for_the_process.clear()
    return before


@contextmanager
def allowing(names: Collection[str] | str) -> Iterator[None]:
    """Allows files to name these functions inside of the block.

    Raises:
        ModelError: if a name is no `package.module:function`.
    """
    # Added to the names of an outer block, which stay allowed inside.
    token = _for_the_block.set(_for_the_block.get() | checked(names))
    try:
        yield
    finally:
        _for_the_block.reset(token)


def checked(names: Collection[str] | str) -> frozenset[str]:
    """Returns the function names in `names` as a set; a single string is one name.

    Raises:
        ModelError: if a name is no `package.module:function`.

    >>> sorted(checked(["nets:Small", "lab.nets:Wide"]))
    ['lab.nets:Wide', 'nets:Small']
    """
    # A string is itself a collection, of letters.
    found = frozenset((names,)) if isinstance(names, str) else frozenset(names)
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ModelError(
                f"got {str(name)[:80]!r}, expected package.module:function, such as 'nets:Net'",
                place="allow_code",
            )
    return found


def allowed(name: str) -> bool:
    """Returns whether the function is allowed, for the process or for the current block."""
    return name in _for_the_process or name in _for_the_block.get()


def check(name: str, allow_code: Collection[str] | str, place: str) -> None:
    """Checks that a function is allowed, by its name only; nothing is imported.

    Args:
        name: the function's name in the file, such as "nets:Small".
        allow_code: functions that are allowed in this call, besides those that `allowed` knows.
        place: the part of the file that has the name, for errors.

    Raises:
        ModelError: if the function is not allowed.
    """
    # Checked first, so that the error for a damaged name does not advise to allow it.
    if not NAME.fullmatch(name):
        raise ModelError(
            f"{name[:80]!r} is neither a name of fedpress nor module:function",
            place=place,
            cure="do not use this file, or get it again from its source",
        )
    if allowed(name) or name in checked(allow_code):
        return
    raise ModelError(
        f"names the code '{name}', which would be called with what the file says",
        place=place,
        cure=(
            "nothing was loaded. If you know this code and trust the file, add ",
            Argument("allow_code", (name,)),
        ),
    )
