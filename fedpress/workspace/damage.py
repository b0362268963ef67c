"""Checks the files of a run before it is resumed: their checksums, and symbolic links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedpress.core import checksums
from fedpress.errors import Argument, RunError, Words
from fedpress.workspace import records
from fedpress.workspace.atomic import check_undamaged, read_json, writing
from fedpress.workspace.stage_folder import PROGRESS, files_of

# Files of a stage that are compared with their checksums later, when a resumed run reads them.
CHECKED_WHEN_READ = (PROGRESS, "model.safetensors", "spec.json")
# The advice if a file that a resumed run writes anew is damaged.
_REWRITTEN: Words = (
    "delete this file: ",
    Argument("resume"),
    " writes it again",
)
# Name of a file in the run folder -> the advice if this file is damaged.
CURES: dict[str, Words] = {
    "recipe.toml": ("move it away, and give the recipe together with ", Argument("resume")),
    "environment.json": "delete this file",
    "data.json": "delete this file; then the data are not compared",
    "before.json": "delete this file to measure the model again",
    "result.json": _REWRITTEN,
    "ledger.json": _REWRITTEN,
    "preparation.json": _REWRITTEN,
    records.NAME: records.CURE,
}
# Part of the advice in several errors to start a new run.
REUSE_HINT = "it can copy the finished stages that are equal: fedpress run RECIPE --from"


def check_links(run: Path) -> None:
    """Checks that no symbolic link in the folder points outside of the folder.

    A run folder may come from a stranger. A resumed run would write through such a link and could
    overwrite, for example, a file in the user's home.

    Raises:
        RunError: if there is such a link; the error names it.
    """
    own = run.resolve()
    for parent, folders, names in os.walk(run):
        for name in (*folders, *names):
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(own):
                raise RunError(
                    (
                        "a symbolic link out of the folder of the run: the run would write to "
                        f"'{path.resolve()}'"
                    ),
                    place=path,
                    cure="replace the link by the file it points to, or delete it",
                )


def check_run(run: Path) -> None:
    """Compares the files of the run with their checksums, then compacts the list of checksums.

    `_is_checked_here` says which files are left out.

    Raises:
        RunError: if a file is damaged, or a symbolic link points out of the folder; the error names
            the first such file and says what to do.
    """
    # Links come first, because reading a file follows its link.
    check_links(run)
    place = run / checksums.NAME
    try:
        names = list(dict.fromkeys(line.name for line in checksums.read_lines(run)))
    except checksums.DamagedList as error:
        cure = "delete this list; then the files are accepted without a check"
        raise RunError(f"corrupt ({error})", place=place, cure=cure) from error
    for name in names:
        path = run / name
        if _is_checked_here(run, path):
            check_undamaged(path, _cure(run, path), grows=path == run / records.NAME)
    with writing(place):
        checksums.compact(run)


def _is_checked_here(run: Path, path: Path) -> bool:
    """Returns whether a file is checked before the run is resumed.

    The files in `CHECKED_WHEN_READ` are checked later. Files of an unfinished stage are not
    checked, because the stage writes them again.
    """
    if path.parent.name == "artifacts":
        return any(path in files_of(run / name) for name in _artifacts(run))
    if path.name in CHECKED_WHEN_READ:
        return False
    return path.parent == run or (path.parent / "result.json").exists()


def _artifacts(run: Path) -> Iterator[str]:
    """Yields the path of each exported file that the result of a finished stage names."""
    for path in (run / "stages").glob("*/result.json"):
        # The error about a damaged result.json is raised when that file itself is checked.
        with suppress(RunError):
            result = read_json(path).get("result")
            artifact = result.get("artifact") if isinstance(result, dict) else None
            if isinstance(artifact, str):
                yield artifact


def _cure(run: Path, path: Path) -> Words:
    if path.parent == run:
        return CURES.get(path.name) or new_run_cure(run)
    if path.name == "result.json":
        return "delete this file to do the stage again"
    if path.parent.name == "artifacts":
        return "delete the result.json of the stage that wrote it, to do that stage again"
    return f"delete '{path.parent / 'result.json'}' to do the stage again"


def new_run_cure(path: Path) -> str:
    """Returns the advice of an error about a damaged file that the run cannot write again.

    Args:
        path: folder of the damaged run.
    """
    return f"start a new run with --out NEW ({REUSE_HINT} {path})"
