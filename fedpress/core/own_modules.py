"""Imports the user's own `module:function` without adding the working folder to Python's path.

With the working folder on the path, every library would import from it: a downloaded file
`onnxruntime.py` would run instead of the library. Here the user's folders are searched last, and
only for modules that the user has named, and for what these modules import.
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

# Old name -> new name of modules of fedpress. Saved files of earlier versions have the old names.
MOVED = {"fedpress.commands.subject": "fedpress.pipeline.commands.subject"}

# Top-level modules that `module_of` is importing.
_wanted: set[str] = set()
# Top-level modules that were found in the user's folders.
_own: set[str] = set()


class OwnModules:
    """An import finder at the end of `sys.meta_path`; it searches the user's `folders` in order."""

    def __init__(self, folders: Sequence[str]) -> None:
        self.folders = list(folders)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: Any = None
    ) -> ModuleSpec | None:
        """Finds a top-level module that `module_of` or a module of the user imports.

        The arguments are those of `importlib.abc.MetaPathFinder`.
        """
        # With a path it is a submodule, which Python finds in the folder of its package.
        if path is not None:
            return None
        if name not in _wanted and _importer(sys._getframe(1)) not in _own:
            return None
        found = PathFinder.find_spec(name, self.folders)
        if found is not None:
            _own.add(name)
        return found


def set_folders(*folders: Path) -> None:
    """Sets the folders of the user's own modules, and removes the working folder from `sys.path`.

    `python -m` and `python -c` put the working folder first in `sys.path`. That entry is removed
    unless PYTHONPATH names the working folder.
    """
    # This call replaces the finder of an earlier call.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, OwnModules)]
    resolved = [str(folder.resolve()) for folder in folders]
    sys.meta_path.append(OwnModules(list(dict.fromkeys(resolved))))
    python_path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = {_real(entry) for entry in python_path if entry}
    here = _real("")
    if sys.path and _real(sys.path[0]) == here and here not in named:
        del sys.path[0]
    # An empty entry means the working folder, too.
    sys.path[:] = [entry for entry in sys.path if entry]


def found() -> list[str]:
    """Returns the top-level modules that were found in the user's folders."""
    return sorted(_own)


def module_of(name: str) -> ModuleType:
    """Imports the module of `package.module:function`.

    Raises:
        ModelError: if a file of the user has the same name as an installed module. The installed
            module would be imported instead of the file.
        Exception: any that the import raises.
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
    """Returns the object that `package.module:function` names.

    Raises:
        ModelError: if there is no such module, importing it fails, it has no such function, or an
            installed module has the same name as the file of the user.

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
            # The command line searches the folder in which it is called, whether or not a recipe is
            # given.
            cure=(
                install,
                "put its folder on PYTHONPATH",
                Shell(", or call fedpress in that folder"),
            ),
        ) from error
    # Importing runs the user's file, which may raise anything.
    except Exception as error:
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
    """Returns the top-level module of the code that imports: the first frame outside importlib."""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("importlib", "_frozen_importlib")) and name != __name__:
            return name.partition(".")[0]
        frame = frame.f_back
    return ""


def _refuse_hidden(top: str) -> None:
    """Checks that a module is not both installed and in the user's folders.

    Raises:
        ModelError: if it is in both: the installed module would be imported, and the user's file
            silently ignored.
    """
    folders: list[str] = []
    for finder in sys.meta_path:
        if isinstance(finder, OwnModules):
            folders += finder.folders
    try:
        installed = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return
    if installed is None or top in _own:
        return
    for folder in folders:
        own = PathFinder.find_spec(top, [folder])
        # A folder without __init__.py has no origin. It is probably not meant as a module.
        if own is None or own.origin is None:
            continue
        if _real(own.origin) != _real(installed.origin or "built-in"):
            new_name = f"my_{top}{Path(own.origin).suffix}"
            raise ModelError(
                (
                    f"{own.origin} has the name of the installed module {installed.origin or top}, "
                    "which is imported instead"
                ),
                place=f"'{top}'",
                cure=f"rename your file, for instance to {new_name}, and name that",
            )


def _real(path: str) -> str:
    return os.path.realpath(path or os.getcwd())
