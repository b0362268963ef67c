"""The folder of a run: begun once, locked while a process works in it, resumed with the same settings only."""

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
from fedpress.workspace.atomic import Json, list_json, listed, read_json, writing
from fedpress.workspace.damage import TAKING_OVER, afresh, check_run
from fedpress.workspace.records import Records
from fedpress.workspace.stage_folder import StageFolder


@dataclass(frozen=True)
class RunFolder:
    """One run's folder."""

    path: Path

    @classmethod
    def create(cls, path: Path, recipe_text: str, settings: Json) -> RunFolder:
        """Makes a new folder, with the recipe as given and the resolved settings.

        Raises:
            RunError: if the folder already holds a run.
        """
        cls.check_free(path, recipe_text)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        with lock.locked(path):
            cls.check_free(
                path, recipe_text
            )  # again: somebody else may have begun a run here since
            with listed(path / "recipe.toml", path) as temporary:
                temporary.write_text(recipe_text, "utf-8")
            list_json(path / "settings.json", {**settings, "streams": STREAMS}, path)
        return cls(path)

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was started with: the resolved recipe.

        Raises:
            RunError: if the file of the settings is missing or damaged.
        """
        return {key: value for key, value in self._settings.items() if key != "streams"}

    @property
    def streams(self) -> int:
        """The version of random streams that the run draws from (`fedpress.core.random.STREAMS`).

        Raises:
            RunError: if the file of the settings says something else than a version.
        """
        found = self._settings.get("streams", 1)  # fedpress 0.1.0 drew the first and did not say so
        if type(found) is not int or found < 1:
            raise RunError(
                f"got {found!r}, expected the version of the random streams, a whole number from 1",
                place=f"{self.path / 'settings.json'}: streams",
                cure=afresh(self.path),
            )
        return found

    @property
    def _settings(self) -> dict[str, Any]:
        return read_json(self.path / "settings.json", cure=afresh(self.path))

    def locked(self) -> AbstractContextManager[None]:
        """Holds the folder's lock while the block lasts: no other process may work in it.

        Raises:
            RunError: if another process does, naming it.
        """
        return lock.locked(self.path)

    @classmethod
    def check_free(cls, path: Path, recipe_text: str) -> None:
        """Refuses a folder in which a run would replace something.

        Raises:
            RunError: if it holds a run or other files, or is no folder.
        """
        lock.refuse(path)
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
        own = (lock.NAME, checksums.NAME, f".{recipe.name}.part", ".settings.json.part")
        found = [p for p in path.iterdir() if p.name not in own] if path.is_dir() else []
        if any(p != recipe or p.read_text("utf-8") != recipe_text for p in found):
            raise RunError(
                "this folder holds other files, which a run might replace",
                place=path,
                cure=("give a new ", Argument("out")),
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens the folder of any run.

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

        Raises:
            RunError: if there is no run, it was made by other settings or is not finished and draws from streams of
                another version, another process works on it, or one of its files was damaged.
        """
        if not (path / "settings.json").exists():
            raise RunError(
                "there is no run to resume", place=path, cure="leave out --resume to start one"
            )
        lock.refuse(path)
        check_run(path)
        folder = cls(path)
        stages = folder.settings.get("stage")
        planned = len(stages) if isinstance(stages, list) else 0
        # Counted here and not read from result.json: a damaged stage may have been deleted since, to be done again.
        done = len(list(path.glob("stages/*/result.json")))
        folder.check_streams(finished=done >= planned > 0)
        old = folder.settings
        if old != settings:
            where = first_difference(old, settings)
            raise RunError(
                f"this run belongs to another recipe ({where})",
                place=path,
                cure=(
                    "use the settings it was started with, or start a new run with --out NEW "
                    f"({TAKING_OVER} {path})"
                ),
            )
        return folder

    def check_streams(self, *, finished: bool) -> None:
        """Refuses to go on with other random numbers: they would deal the examples to other clients, among others.

        Raises:
            RunError: if not all stages are `finished`, and the run began with streams of another version.
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
        """Opens the folder of one stage."""
        path = self.path / "stages" / f"{index}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        return StageFolder(self.path, path, index, kind, name)


def first_difference(old: Any, new: Any, at: str = "recipe") -> str:
    """Says in words where two JSON values first differ.

    >>> first_difference({"a": [1, 2]}, {"a": [1, 3]})
    'recipe.a[1] was 2, now 3'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{at}.{key}")
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (a, b) in enumerate(zip(old, new, strict=True)):
            if a != b:
                return first_difference(a, b, f"{at}[{position}]")
    if isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
        return f"{at} had {len(old)} entries, now {len(new)}"
    return f"{at} was {json.dumps(old)[:80]}, now {json.dumps(new)[:80]}"
