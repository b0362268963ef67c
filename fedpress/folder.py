"""The run folder: everything a run leaves behind, written atomically, so that a killed run goes on to the same bits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpress.errors import RunError
from fedpress.models import ModelSpec, load_model, save_model

Json = Mapping[str, JsonValue]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        RunError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; is this the folder of a run?") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not valid JSON ({error}); delete the folder and run again") from error


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
        if (path / "settings.json").exists():
            raise RunError(f"{path}: this folder already holds a run; add --resume to go on, or give another --out")
        path.mkdir(parents=True, exist_ok=True)
        (path / "recipe.toml").write_text(recipe_text)
        write_json(path / "settings.json", settings)
        return cls(path)

    @classmethod
    def resume(cls, path: Path, settings: Json) -> RunFolder:
        """Opens the folder of an interrupted run.

        Raises:
            RunError: if there is no run, or it was made by other settings.
        """
        if not (path / "settings.json").exists():
            raise RunError(f"{path}: there is no run to resume; leave out --resume to start one")
        old = read_json(path / "settings.json")
        if old != settings:
            where = first_difference(old, settings)
            raise RunError(
                f"{path}: this run belongs to another recipe ({where}); use the settings it was started with, or "
                f"start a new run with --out NEW --from {path}, which takes over the finished stages that are equal"
            )
        return cls(path)

    @property
    def records(self) -> Path:
        """The file of records, one JSON object a line."""
        return self.path / "records.jsonl"

    def count_records(self) -> int:
        """Returns the number of whole records."""
        return self.records.read_bytes().count(b"\n") if self.records.exists() else 0

    def record(self, facts: Json) -> None:
        """Appends one record and sees it to the disk."""
        with open(self.records, "a") as file:
            file.write(json.dumps(facts) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_records(self, count: int) -> None:
        """Drops all but the first `count` records: what was written after the last checkpoint will be done again."""
        if not self.records.exists():
            return
        lines = self.records.read_bytes().splitlines(keepends=True)
        if len(lines) > count:
            with replacing(self.records) as temporary:
                temporary.write_bytes(b"".join(lines[:count]))

    def stage(self, index: int, kind: str, name: str) -> StageFolder:
        """Opens the folder of one stage."""
        path = self.path / "stages" / f"{index}-{name}"
        path.mkdir(parents=True, exist_ok=True)
        return StageFolder(self, path, index, kind, name)


@dataclass(frozen=True)
class StageFolder:
    """The part of a run folder that belongs to one stage."""

    run: RunFolder
    path: Path
    index: int
    kind: str
    name: str

    def record(self, **facts: JsonValue) -> None:
        """Appends a record of this stage to the run's records."""
        self.run.record({"stage": self.index, "kind": self.kind, "name": self.name, **facts})

    def save_progress(self, tensors: Mapping[str, Tensor], facts: Json) -> None:
        """Saves a checkpoint inside the stage: named tensors and JSON facts in one file, replaced in one step."""
        plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        about = json.dumps({**facts, "records": self.run.count_records()})
        with replacing(self.path / "progress.safetensors") as temporary:
            save_file(plain, temporary, metadata={"fedpress": about})

    def load_progress(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns the last checkpoint inside the stage, and drops the records that came after it; None without one.

        Raises:
            RunError: if the file is corrupt.
        """
        path = self.path / "progress.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["fedpress"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise RunError(f"{path}: corrupt checkpoint ({error}); delete this file to do the stage again") from error
        self.run.cut_records(facts["records"])
        return tensors, facts

    def finish(self, spec: ModelSpec, model: nn.Module, result: Json, *, key: str) -> None:
        """Saves the stage's model and result; the result file, written last, marks the stage as done."""
        save_model(self.path, spec, model)
        write_json(self.path / "result.json", {"key": key, "records": self.run.count_records(), "result": result})
        (self.path / "progress.safetensors").unlink(missing_ok=True)

    def finished(self, key: str) -> dict[str, Any] | None:
        """Returns the result of this stage if it is done under the same `key`, else None."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        done = read_json(path)
        return done["result"] if done.get("key") == key else None

    def load(self) -> tuple[ModelSpec, nn.Module]:
        """Loads the model that the finished stage left."""
        return load_model(self.path)

    def adopt(self, other: Path, key: str) -> bool:
        """Copies the same stage, done under the same `key`, from the run folder `other`; False if there is none."""
        theirs = StageFolder(RunFolder(other), other / "stages" / self.path.name, self.index, self.kind, self.name)
        if theirs.finished(key) is None:
            return False
        for line in theirs.run.records.read_text().splitlines():
            if json.loads(line)["stage"] == self.index:
                self.run.record(json.loads(line))
        shutil.copytree(theirs.path, self.path, dirs_exist_ok=True)
        return True


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
    return f"{at} was {json.dumps(old)[:80]}, now {json.dumps(new)[:80]}"
