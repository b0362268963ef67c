"""The folder of a run: it is created, locked while a process works in it, and can be resumed.

A run does the stages of a recipe (a TOML file with all settings). The folder has the recipe, the
resolved settings, the records of epochs and rounds, and one folder per stage.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.core import checksums
from fedpress.core.random import STREAMS
from fedpress.errors import Argument, RunError, Shell
from fedpress.workspace import lock
from fedpress.workspace.atomic import (
    Json,
    read_json,
    replacing_with_checksum,
    write_json_with_checksum,
    writing,
)
from fedpress.workspace.damage import REUSE_HINT, check_run, new_run_cure
from fedpress.workspace.records import Records
from fedpress.workspace.stage_folder import StageFolder


@dataclass(frozen=True)
class RunFolder:
    """The folder `path` of one run, which is new, interrupted or finished."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe_text: str, settings: Json) -> RunFolder:
        """Makes a new folder with the recipe's text and the resolved settings.

        Args:
            path: the folder.
            recipe_text: the recipe as TOML.
            settings: all settings with their defaults, without keys that may change when the run is
                resumed, such as the device.

        Raises:
            RunError: if the folder already contains a run or other files, another process works in
                it, or it cannot be written.
        """
        cls.check_free(path, recipe_text)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        with lock.locked(path):
            # Second check: another process may have begun a run here before the lock was taken.
            cls.check_free(path, recipe_text)
            with replacing_with_checksum(path / "recipe.toml", path) as temporary:
                temporary.write_text(recipe_text, "utf-8")
            write_json_with_checksum(path / "settings.json", {**settings, "streams": STREAMS}, path)
        return cls(path)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which the run was started, as they were given to `create`.

        Settings that may change when the run is resumed, such as the device, are not among them.

        Raises:
            RunError: if settings.json is missing or damaged.
        """
        return {key: value for key, value in self._settings.items() if key != "streams"}

    @property
    def streams(self) -> int:
        """The version of the random streams that the run uses (`fedpress.core.random.STREAMS`).

        Raises:
            RunError: if settings.json has no valid version.
        """
        # fedpress 0.1.0 used version 1 and did not write it.
        found = self._settings.get("streams", 1)
        # A bool is an int for isinstance.
        if type(found) is not int or found < 1:
            raise RunError(
                f"got {found!r}, expected the version of the random streams, a whole number from 1",
                place=f"{self.path / 'settings.json'}: streams",
                cure=new_run_cure(self.path),
            )
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        return read_json(self.path / "settings.json", cure=new_run_cure(self.path))

    def locked(self) -> AbstractContextManager[None]:
        """Holds the folder's lock during the block, so that no other process works in the folder.

        Raises:
            RunError: if another process has the lock; the error names that process.
        """
        return lock.locked(self.path)

    @classmethod
    def check_free(cls, path: Path, recipe_text: str) -> None:
        """Checks that a new run in this folder would replace nothing.

        Args:
            path: the folder.
            recipe_text: the recipe of the new run as TOML. The folder may have a recipe.toml with
                exactly this text.

        Raises:
            RunError: if the folder contains a run or other files, another process works in it, or
                `path` is a file.
        """
        lock.check_unlocked(path)
        if (path / "settings.json").exists():
            raise RunError(
                "this folder already holds a run",
                place=path,
                cure=(Shell("add --resume to go on, or "), "give another ", Argument("out")),
            )
        recipe = path / "recipe.toml"
        if path.exists() and not path.is_dir():
            cure = ("give a folder with ", Argument("out"))
            raise RunError("this is a file", place=path, cure=cure)
        if not path.is_dir():
            return
        # A process that was killed while it created a run may have written these files. A new run
        # writes them again.
        own = (lock.NAME, checksums.NAME, f".{recipe.name}.part", ".settings.json.part")
        for found in path.iterdir():
            if found.name in own:
                continue
            if found != recipe or found.read_text("utf-8") != recipe_text:
                raise RunError(
                    "this folder holds other files, which a run might replace",
                    place=path,
                    cure=("give a new ", Argument("out")),
                )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens the folder of a run, finished or not.

        Raises:
            RunError: if there is no run.
        """
        if not (path / "settings.json").exists():
            raise RunError(
                "there is no run in this folder",
                place=path,
                cure="give the --out of an earlier run",
            )
        return cls(path)

    @classmethod
    def resume(cls, path: Path, settings: Json) -> RunFolder:
        """Opens the folder of an interrupted run.

        Args:
            path: the folder.
            settings: all settings of the recipe to resume with, as in `create`.

        Raises:
            RunError: if there is no run; if its settings differ from `settings`; if it is not
                finished and uses random streams of another version; if another process works in the
                folder; or if one of its files is damaged.
        """
        if not (path / "settings.json").exists():
            raise RunError(
                "there is no run to resume",
                place=path,
                cure=("give a recipe and leave out ", Argument("resume"), " to start one"),
            )
        lock.check_unlocked(path)
        check_run(path)
        folder = cls(path)
        stages = folder.settings.get("stage")
        planned = len(stages) if isinstance(stages, list) else 0
        # Counts the result files of the stages. The run's own result.json may be outdated: the user
        # may have deleted a damaged stage after it was written, to run that stage again.
        done = len(list(path.glob("stages/*/result.json")))
        folder.check_streams(finished=done >= planned > 0)
        old = folder.settings
        # With other settings, stages of two different recipes would be mixed in one result.
        if old != settings:
            where = first_difference(old, settings)
            raise RunError(
                f"this run belongs to another recipe ({where})",
                place=path,
                cure=(
                    "use the settings it was started with, or start a new run with --out NEW "
                    f"({REUSE_HINT} {path})"
                ),
            )
        return folder

    def check_streams(self, *, finished: bool) -> None:
        """Checks that a resumed run draws the same random numbers as before.

        With other random numbers it would, for example, assign the examples to other clients.

        Args:
            finished: whether all stages are done, so that no random numbers are drawn any more.

        Raises:
            RunError: if `finished` is False, and the run began with random streams of another
                version.
        """
        if self.streams != STREAMS and not finished:
            raise RunError(
                f"this run began with random streams of version {self.streams}, and this fedpress "
                f"draws those of version {STREAMS}",
                place=self.path,
                cure="go on with the fedpress that began it, or start it anew with --out NEW",
            )

    @property
    def records(self) -> Records:
        """The records of all stages."""
        return Records(self.path)

    def stage(self, index: int, kind: str, name: str) -> StageFolder:
        """Opens the folder of one stage, such as `stages/1-prune`; makes it if it is missing."""
        path = self.path / "stages" / f"{index}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        return StageFolder(self.path, path, index, kind, name)


def first_difference(old: Any, new: Any, at: str = "recipe") -> str:
    """Describes the first difference of two JSON values.

    >>> first_difference({"a": [1, 2]}, {"a": [1, 3]})
    'recipe.a[1] was 2, now 3'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{at}.{key}")
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{at} had {len(old)} entries, now {len(new)}"
        for position, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return first_difference(a, b, f"{at}[{position}]")
    return f"{at} was {json.dumps(old)[:80]}, now {json.dumps(new)[:80]}"
