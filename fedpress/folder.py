"""The run folder: everything a run leaves behind, written atomically, so that a killed run goes on to the same bits."""

from __future__ import annotations

import errno
import json
import math
import os
import re
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

from fedpress import atomic
from fedpress.errors import RunError
from fedpress.models import ModelSpec, load_model, save_model

Json = Mapping[str, JsonValue]
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what can go wrong while `path` is written into an error that names the place and the cure.

    Raises:
        RunError: if the disk is full, or the place cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)|code: (\d+)", str(error))  # safetensors tells the number in words only
        number = error.errno if isinstance(error, OSError) else int(found[1] or found[2]) if found else None
        reason = os.strerror(number) if number else str(error)
        cure = "free some space, then go on with --resume" if number in FULL else "choose another place with --out"
        raise RunError(f"{path}: cannot be written ({reason}); what was finished is kept: {cure}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed.

    Raises:
        RunError: if it cannot be written; what was at `path` is still there.
    """
    with writing(path), atomic.replacing(path) as temporary:
        yield temporary


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically; NaN and infinity, which JSON does not know, become null."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, *, cure: str = "delete the folder and run again") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        RunError: if the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file; is this the folder of a run?") from error
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error}); {cure}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: expected a JSON object, got {type(value).__name__}; {cure}")
    return value


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
        recipe = path / "recipe.toml"
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        with replacing(recipe) as temporary:
            temporary.write_text(recipe_text, "utf-8")
        write_json(path / "settings.json", settings)
        return cls(path)

    @classmethod
    def check_free(cls, path: Path, recipe_text: str) -> None:
        """Refuses a folder in which a run would replace something.

        Raises:
            RunError: if it holds a run or other files, or is no folder.
        """
        if (path / "settings.json").exists():
            raise RunError(f"{path}: this folder already holds a run; add --resume to go on, or give another --out")
        recipe = path / "recipe.toml"
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: this is a file; give a folder with --out")
        if path.is_dir() and any(p != recipe or p.read_text("utf-8") != recipe_text for p in path.iterdir()):
            raise RunError(f"{path}: this folder holds other files, which a run might replace; give a new --out")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens the folder of any run.

        Raises:
            RunError: if there is no run.
        """
        if not (path / "settings.json").exists():
            raise RunError(f"{path}: there is no run in this folder; give the --out of an earlier run")
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
        with writing(self.records), open(self.records, "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(facts), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def cut_records(self, count: int) -> None:
        """Drops all but the first `count` records, and half a record that a killed run left at the end."""
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
class Done:
    """What a finished stage left: its line of the result, and how many records there were at its end."""

    result: dict[str, Any]
    records: int


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

    def begin(self, records: int) -> float:
        """Drops the records after the last checkpoint, or after the first `records` of them if there is none.

        What they tell of will be done again. Returns the seconds that were spent until the checkpoint.
        """
        facts = self.load_progress()[1] if self._progress.exists() else {}
        self.run.cut_records(facts.get("records", records))
        return float(facts.get("seconds", 0.0))

    def save_progress(self, tensors: Mapping[str, Tensor], facts: Json) -> None:
        """Saves a checkpoint inside the stage: named tensors and JSON facts in one file, replaced in one step."""
        plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        about = json.dumps({**facts, "records": self.run.count_records()})
        with replacing(self._progress) as temporary:
            save_file(plain, temporary, metadata={"fedpress": about})

    def load_progress(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the last checkpoint inside the stage; two empty dicts if there is none.

        Raises:
            RunError: if the file is corrupt.
        """
        if not self._progress.exists():
            return {}, {}
        try:
            with safe_open(self._progress, framework="pt") as file:
                facts = json.loads(file.metadata()["fedpress"])
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{self._progress}: corrupt checkpoint ({error}); delete this file to do the stage again"
            ) from error

    @property
    def _progress(self) -> Path:
        return self.path / "progress.safetensors"

    def finish(self, spec: ModelSpec, model: nn.Module, result: Json, *, key: str) -> Done:
        """Saves the stage's model and result; the result file, written last, marks the stage as done."""
        with writing(self.path / "model.safetensors"):
            save_model(self.path, spec, model)
            atomic.sync(self.path / "model.safetensors")
            atomic.sync(self.path / "spec.json")
        done = Done(dict(result), self.run.count_records())
        write_json(self._result, {"key": key, "records": done.records, "result": done.result})
        self._progress.unlink(missing_ok=True)
        self.forget()
        return done

    @property
    def memory(self) -> Path:
        """Where the clients of a simulation keep what must outlive a process: private data among it."""
        return self.path / "memory"

    def forget(self) -> None:
        """Removes `memory`."""
        shutil.rmtree(self.memory, ignore_errors=True)

    def finished(self, key: str) -> Done | None:
        """Returns what the stage left if it is done under the same `key`, else None."""
        if not self._result.exists():
            return None
        page = read_json(self._result, cure="delete this file to do the stage again")
        return Done(page["result"], page["records"]) if page.get("key") == key else None

    @property
    def _result(self) -> Path:
        return self.path / "result.json"

    def load(self) -> tuple[ModelSpec, nn.Module]:
        """Loads the model that the finished stage left."""
        return load_model(self.path)

    def adopt(self, other: RunFolder, key: str, *, records: int) -> Done | None:
        """Copies the same stage, done under the same `key`, from another run; None if that has none.

        Args:
            other: the run to copy from; nothing is changed there.
            key: see `finished`.
            records: how many records of earlier stages there are.
        """
        theirs = StageFolder(other, other.path / "stages" / self.path.name, self.index, self.kind, self.name)
        done = theirs.finished(key)
        if done is None:
            return None
        self.run.cut_records(records)
        with writing(self.path):
            shutil.copytree(theirs.path, self.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("result.json"))
            if artifact := done.result.get("artifact"):
                (self.run.path / artifact).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other.path / artifact, self.run.path / artifact)
        for line in other.records.read_bytes().splitlines(keepends=True) if other.records.exists() else ():
            if line.endswith(b"\n") and json.loads(line)["stage"] == self.index:
                self.run.record(json.loads(line))
        with replacing(self._result) as temporary:  # last, for it says that all is there
            shutil.copyfile(theirs._result, temporary)
        return done


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
