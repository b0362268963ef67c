"""Which code a file may have called: `module:function` names that the user has allowed, one by one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fedpress.errors import Argument, ModelError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`package.module:function`; the function is an attribute of the module itself, with no dot in it."""

_for_the_process: set[str] = set()
_for_the_block: ContextVar[frozenset[str]] = ContextVar("fedpress_consent", default=frozenset())


def allow(*names: str) -> None:
    """Notes that the user of this process named these functions: files may name them too, as long as it lives.

    A recipe's own `architecture = "module:function"` and a MODEL given as `module:function` are noted like this.

    Raises:
        ModelError: if one is no `package.module:function`.
    """
    _for_the_process.update(checked(names))


def withdraw() -> frozenset[str]:
    """Takes back all that `allow` noted in this process, and returns it."""
    before = frozenset(_for_the_process)
    _for_the_process.clear()
    return before


@contextmanager
def allowing(names: Collection[str] | str) -> Iterator[None]:
    """Lets files name these functions while the block lasts.

    Raises:
        ModelError: if one is no `package.module:function`.
    """
    token = _for_the_block.set(_for_the_block.get() | checked(names))
    try:
        yield
    finally:
        _for_the_block.reset(token)


def checked(names: Collection[str] | str) -> frozenset[str]:
    """Returns the names of `allow_code` as a set; a single string is one name.

    Raises:
        ModelError: if one is no `package.module:function`.

    >>> sorted(checked(["nets:Small", "lab.nets:Wide"]))
    ['lab.nets:Wide', 'nets:Small']
    """
    found = frozenset((names,)) if isinstance(names, str) else frozenset(names)
    for name in found:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ModelError(
                f"got {str(name)[:80]!r}, expected package.module:function, such as 'nets:Net'",
                place="allow_code",
            )
    return found


def allowed(name: str) -> bool:
    """Whether the user has named this function, for the process or for the present block."""
    return name in _for_the_process or name in _for_the_block.get()


def check(name: str, allow_code: Collection[str] | str, place: str) -> None:
    """Lets pass what the user has allowed by name; nothing is imported to find out.

    Args:
        name: as a file says it.
        allow_code: what the user allows in this call, besides what `allowed` knows.
        place: the part of the file that says the name.

    Raises:
        ModelError: if the user has not named it.
    """
    if not NAME.fullmatch(name):
        raise ModelError(
            f"{name[:80]!r} is neither an architecture of fedpress nor module:function",
            place=place,
            cure="do not use this file, or get it anew from where it came",
        )
    if allowed(name) or name in checked(allow_code):
        return
    raise ModelError(
        f"names the function '{name}', which would be called with what the file says",
        place=place,
        cure=(
            "nothing was loaded. If you know this function and trust the file, add ",
            Argument("allow_code", (name,)),
        ),
    )
