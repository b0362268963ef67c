"""What was damaged in the folder of a run: every file against its checksum, links out of it, and the cures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from fedpress.core import checksums
from fedpress.errors import RunError
from fedpress.workspace import records
from fedpress.workspace.atomic import check_whole, read_json, writing
from fedpress.workspace.stage_folder import PROGRESS, files_of

READ = (PROGRESS, "model.safetensors", "spec.json")
"""Files that are compared with their checksums when a run that goes on reads them."""
CURES = {
    "recipe.toml": "move it away, and name the recipe with --resume",
    "environment.json": "delete this file",
    "before.json": "delete this file to measure the model again",
    "result.json": "delete this file: a run that goes on with --resume writes it again",
    "ledger.json": "delete this file: a run that goes on with --resume writes it again",
    records.NAME: records.CURE,
}
"""What helps against damage of a file of a run."""
TAKING_OVER = "`fedpress run` takes over finished stages that are equal by --from"


def check_links(run: Path) -> None:
    """Looks whether something in the folder lies elsewhere: going on would write there.

    Raises:
        RunError: naming a symbolic link that leads out of the folder.
    """
    own = run.resolve()
    for above, folders, names in os.walk(run):
        for path in (Path(above) / name for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(own):
                raise RunError(
                    (
                        "a symbolic link out of the folder of the run, through which it would write to "
                        f"'{path.resolve()}'"
                    ),
                    place=path,
                    cure="put what it leads to in its place, or delete it",
                )


def check_run(run: Path) -> None:
    """Compares every file of the run with its checksum, then tidies the lists of checksums.

    Raises:
        RunError: naming the first file that was damaged, and the cure.
    """
    check_links(run)
    place = run / checksums.NAME
    try:
        names = list(dict.fromkeys(line.name for line in checksums.read(run)))
    except checksums.DamagedList as error:
        cure = "delete it, and what it lists is taken as it is"
        raise RunError(f"corrupt ({error})", place=place, cure=cure) from error
    for path in (run / name for name in names):
        if _must_be_whole(run, path):
            check_whole(path, _cure(run, path), grows=path == run / records.NAME)
    with writing(place):
        checksums.tidy(run)


def _must_be_whole(run: Path, path: Path) -> bool:
    """Whether this file has to be whole, and nobody else will look.

    What a stage has left before its end is made again.
    """
    if path.parent.name == "artifacts":
        return any(path in files_of(run / name) for name in _artifacts(run))
    if path.name in READ:
        return False
    return path.parent == run or (path.parent / "result.json").exists()


def _artifacts(run: Path) -> Iterator[str]:
    """The artifacts that the results of finished stages name."""
    for path in (run / "stages").glob("*/result.json"):
        with suppress(RunError):  # a damaged one is told by its own name
            result = read_json(path).get("result")
            if isinstance(result, dict) and isinstance(artifact := result.get("artifact"), str):
                yield artifact


def _cure(run: Path, path: Path) -> str:
    if path.parent == run:
        return CURES.get(path.name) or afresh(run)
    if path.name == "result.json":
        return "delete this file to do the stage again"
    if path.parent.name == "artifacts":
        return "delete the result.json of the stage that wrote it, to do that stage again"
    return f"delete '{path.parent / 'result.json'}' to do the stage again"


def afresh(path: Path) -> str:
    """Returns the cure for a file that nothing can make again."""
    return f"start a new run with --out NEW ({TAKING_OVER} {path})"
