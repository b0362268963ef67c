"""Where a user's own `module:function` is found: after everything installed, and by nobody but the user's own code.

Python's import path would offer the working folder to every import of every library: a file `onnxruntime.py` that
happens to lie there would run in the library's place. Here own folders are asked last, and only for a module that the
user has named and for what such a module imports in turn.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from fedpress.errors import ModelError, Shell, suggestion

MOVED = {"fedpress.commands.subject": "fedpress.pipeline.commands.subject"}
"""Modules of fedpress that files of earlier versions name, and where they lie now."""

_wanted: set[str] = set()  # top modules that `module_of` is looking for
_own: set[str] = set()  # top modules that were found in the user's folders


class OwnModules:
    """The finder behind all others of `sys.meta_path`; `folders` are asked in order."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = list(folders)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        """Finds a top module for `module_of`, or for code that was found here; see `importlib.abc.MetaPathFinder`."""
        if path is not None:  # a part of a package, which knows itself where its parts lie
            return None
        if name not in _wanted and _importer(sys._getframe(1)) not in _own:
            return None
        found = PathFinder.find_spec(name, self.folders)
        if found is not None:
            _own.add(name)
        return found


def look_in(*folders: Path) -> None:
    """Names the folders of the user's own modules, and takes the working folder out of Python's import path.

    Python puts it there by itself with `-m` and `-c`; a folder that PYTHONPATH names stays.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, OwnModules)]
    resolved = (str(folder.resolve()) for folder in folders)
    sys.meta_path.append(OwnModules(list(dict.fromkeys(resolved))))
    named = {_real(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    here = _real("")
    if sys.path and _real(sys.path[0]) == here and here not in named:
        del sys.path[0]
    sys.path[:] = [entry for entry in sys.path if entry]


def module_of(name: str) -> ModuleType:
    """Imports the module of `package.module:function`.

    Raises:
        ModelError: if a file of the user has the name of an installed module, which would be taken in its place.
        Exception: whatever importing raises.
    """
    module = name.partition(":")[0]
    module = MOVED.get(module, module)
    top = module.partition(".")[0]
    _refuse_hidden(top)
    _wanted.add(top)
    try:
        return importlib.import_module(module)
    finally:
        _wanted.discard(top)


def object_of(name: str) -> Any:
    """Returns what `package.module:function` names.

    Raises:
        ModelError: if there is no such module, importing it fails, or it has no such function.

    >>> object_of("json:dumps")([1])
    '[1]'
    """
    wanted = name.partition(":")[2]
    try:
        module = module_of(name)
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        own = f"{name.partition(':')[0]}.".startswith(f"{error.name}.")
        install = "" if own else "install what it imports, or "
        raise ModelError(
            f"no module '{error.name}'",
            place=f"'{name}'",
            # The command line looks into the folder where it is called, whether or not there is a recipe.
            cure=(
                install,
                "put its folder on PYTHONPATH",
                Shell(", or call fedpress in that folder"),
            ),
        ) from error
    except Exception as error:  # importing runs the user's file, which may raise anything
        raise ModelError(
            f"importing it failed with {type(error).__name__}: {error}",
            place=f"'{name}'",
            cure="correct it",
        ) from error
    if not hasattr(module, wanted):
        raise ModelError(
            f"the module has no function '{wanted}'",
            place=f"'{name}'",
            cure=suggestion(wanted, dir(module)) or "name one that it has",
        )
    return getattr(module, wanted)


def _importer(frame: FrameType | None) -> str:
    """The top module of the code that imports: the first frame that does not belong to the import system."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("importlib", "_frozen_importlib")) and name != __name__:
            return name.partition(".")[0]
        frame = frame.f_back
    return ""


def _refuse_hidden(top: str) -> None:
    """Refuses a name that means one thing among the installed modules and another in the user's folders."""
    folders = [
        folder
        for finder in sys.meta_path
        if isinstance(finder, OwnModules)
        for folder in finder.folders
    ]
    try:
        installed = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if installed is None or top in _own:
        return
    for folder in folders:
        own = PathFinder.find_spec(top, [folder])
        if (
            own is None or own.origin is None
        ):  # a folder without __init__.py is no module of its own
            continue
        if _real(own.origin) != _real(installed.origin or "built-in"):
            raise ModelError(
                (
                    f"{own.origin} has the name of the installed module {installed.origin or top}, "
                    "which goes first"
                ),
                place=f"'{top}'",
                cure=(
                    f"rename your file, for instance to my_{top}{Path(own.origin).suffix}, and name "
                    "that"
                ),
            )


def _real(path: str) -> str:
    return os.path.realpath(path or os.getcwd())
