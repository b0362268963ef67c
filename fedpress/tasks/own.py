"""The user's own task: `task = "module:Class"` names a subclass of `Task` in the user's code."""

from __future__ import annotations

from fedpress.core import consent, own_modules
from fedpress.errors import ModelError, RecipeError
from fedpress.tasks.base import Task

_loaded: dict[str, type[Task]] = {}
"""The classes that were loaded in this process, by their names in recipes."""


def is_own(kind: str) -> bool:
    """Whether the name of a task is `package.module:Class`, so that it names code of the user.

    >>> is_own("boxes:Boxes"), is_own("binary")
    (True, False)
    """
    return consent.NAME.fullmatch(kind) is not None


def load(kind: str) -> type[Task]:
    """Imports the class of a user's own task.

    Raises:
        ModelError: if the user has not allowed this code (`fedpress.core.consent`); then nothing is
            imported. Or if there is no such module or class.
        RecipeError: if it is no complete subclass of `Task`.
    """
    consent.check(kind, (), "task")
    try:
        found = own_modules.object_of(kind)
    except ModelError as error:
        if error.place == f"'{kind}'":
            error.place = f"task '{kind}'"
        raise
    if not (isinstance(found, type) and issubclass(found, Task)):
        got = found.__name__ if isinstance(found, type) else type(found).__name__
        raise RecipeError(
            f"'{kind}' is {got}, which is no subclass of fedpress.tasks.Task",
            place="task",
            cure="write class MyTask(Task), as docs/tasks.md shows",
        )
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if missing:
        raise RecipeError(
            f"'{kind}' lacks {', '.join(missing)}",
            place="task",
            cure="define these methods in the class, as docs/tasks.md shows",
        )
    # Saved models and results name the task as the recipe does, whatever the class says.
    found.kind = kind
    _loaded[kind] = found
    return found


def loaded(kind: str) -> type[Task] | None:
    """Returns the class if it was loaded in this process, else None; nothing is imported."""
    return _loaded.get(kind)
