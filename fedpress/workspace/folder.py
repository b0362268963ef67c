"""The run folder: everything a run leaves behind, written atomically, so that a killed run goes on to the same bits."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpress.core import checksums, files
from fedpress.core.random import STREAMS
from fedpress.errors import RunError
from fedpress.models import ModelSpec, load_model, save_model
from fedpress.tasks import task_of
from fedpress.workspace import lock

Json = Mapping[str, JsonValue]
PROGRESS = "progress.safetensors"
INPUTS = "inputs.json"
"""In artifacts/: how raw rows of a table become the inputs of the files there."""
NEEDED = ("kind", "name", "seconds", "parameters")
"""What the line of a finished stage has at least, beside the primary metric of its task."""
UNLISTED = (PROGRESS, "result.json")
"""Files of a stage whose checksums are listed when they are written."""
READ = (PROGRESS, "model.safetensors", "spec.json")
"""Files that are compared with their checksums when a run that goes on reads them."""
CURES = {
    "recipe.toml": "move it away, and name the recipe with --resume",
    "environment.json": "delete this file",
    "before.json": "delete this file to measure the model again",
    "result.json": "delete this file: a run that goes on with --resume writes it again",
    "ledger.json": "delete this file: a run that goes on with --resume writes it again",
    "records.jsonl": "delete this file to go on without the records so far (models and results do not need them)",
}
"""What helps against damage of a file of a run."""


def writing(path: Path) -> AbstractContextManager[None]:
    """Turns what can go wrong while `path` of a run is written into an error that names the place and the cure.

    Raises:
        RunError: if the disk is full, or the place cannot be written.
    """
    kept = "what was finished is kept: "
    return files.writing(
        path,
        full=f"{kept}free some space, then go on with --resume",
        other=f"{kept}choose another place with --out",
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on success it takes `path`'s place in one step, on failure it is removed.

    Raises:
        RunError: if it cannot be written; what was at `path` is still there.
    """
    with writing(path), files.replacing(path) as temporary:
        yield temporary


@contextmanager
def listed(path: Path, run: Path) -> Iterator[Path]:
    """As `replacing`, and puts the checksum of what takes `path`'s place into the list of the folder `run`.

    Raises:
        RunError: if it cannot be written; what was at `path` is still there.
    """
    with replacing(path) as temporary:
        yield temporary
        checksums.note(path, temporary, folder=run)


def check_whole(path: Path, cure: str, *, grows: bool = False, what: str = "corrupt") -> None:
    """Compares a file with its checksum, if it has one; `what` begins the complaint.

    Raises:
        RunError: if it was damaged, with the cure.
    """
    if not path.exists():
        return
    try:
        found = checksums.fault(path, grows=grows)
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror})", place=path, cure=cure) from error
    if found:
        own = f"or if you have changed it yourself, delete '{checksums.list_of(path)}'"
        raise RunError(f"{what} ({found})", place=path, cure=f"{cure}, {own}")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, atomically; NaN and infinity, which JSON does not know, become null."""
    with replacing(path) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def list_json(path: Path, value: Any, run: Path) -> None:
    """As `write_json`, and puts the checksum of the file into the list of the folder `run`."""
    with listed(path, run) as temporary:
        temporary.write_text(_as_json(value), "utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path, *, cure: str = "delete the folder and run again") -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        RunError: if the file is missing, differs from its checksum, or holds something else.
    """
    check_whole(path, cure)
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RunError("no such file", place=path, cure="is this the folder of a run?") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"not valid JSON ({error})", place=path, cure=cure) from error
    if not isinstance(value, dict):
        raise RunError(
            f"expected a JSON object, got {type(value).__name__}",
            place=path,
            cure=cure,
        )
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
        """The version of random streams that the run draws from (`fedpress.core.random.STREAMS`)."""
        return int(self._settings.get("streams", 1))

    @property
    def _settings(self) -> dict[str, Any]:
        return read_json(self.path / "settings.json", cure=_afresh(self.path))

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
                cure="add --resume to go on, or give another --out",
            )
        recipe = path / "recipe.toml"
        if path.exists() and not path.is_dir():
            raise RunError("this is a file", place=path, cure="give a folder with --out")
        own = (lock.NAME, checksums.NAME, f".{recipe.name}.part", ".settings.json.part")
        found = [p for p in path.iterdir() if p.name not in own] if path.is_dir() else []
        if any(p != recipe or p.read_text("utf-8") != recipe_text for p in found):
            raise RunError(
                "this folder holds other files, which a run might replace",
                place=path,
                cure="give a new --out",
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
        folder = cls(path)
        folder.check_whole()
        folder._check_streams()
        old = folder.settings
        if old != settings:
            where = first_difference(old, settings)
            raise RunError(
                f"this run belongs to another recipe ({where})",
                place=path,
                cure=(
                    "use the settings it was started with, or start a new run with --out NEW "
                    f"--from {path}, which takes over the finished stages that are equal"
                ),
            )
        return folder

    def _check_streams(self) -> None:
        """Refuses to go on with other random numbers: they would deal the examples to other clients, among others.

        Raises:
            RunError: if the run is not finished, and began with streams of another version.
        """
        result = self.path / "result.json"
        finished = result.exists() and read_json(result, cure=CURES[result.name]).get("finished")
        if self.streams != STREAMS and not finished:
            raise RunError(
                f"this run began with random streams of version {self.streams}, and this fedpress "
                f"draws those of version {STREAMS}",
                place=self.path,
                cure="go on with the fedpress that began it, or start it anew with --out NEW",
            )

    def check_links(self) -> None:
        """Looks whether something in the folder lies elsewhere: going on would write there.

        Raises:
            RunError: naming a symbolic link that leads out of the folder.
        """
        own = self.path.resolve()
        for above, folders, names in os.walk(self.path):
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

    def check_whole(self) -> None:
        """Compares every file of the run with its checksum, then tidies the lists of checksums.

        Raises:
            RunError: naming the first file that was damaged, and the cure.
        """
        self.check_links()
        place = self.path / checksums.NAME
        try:
            names = list(dict.fromkeys(line.name for line in checksums.read(self.path)))
        except checksums.DamagedList as error:
            cure = "delete it, and what it lists is taken as it is"
            raise RunError(f"corrupt ({error})", place=place, cure=cure) from error
        for path in (self.path / name for name in names):
            if self._counts(path):
                check_whole(path, self._cure(path), grows=path == self.records)
        with writing(place):
            checksums.tidy(self.path)

    def _counts(self, path: Path) -> bool:
        """Whether this file has to be whole, and nobody else will look.

        What a stage has left before its end is made again.
        """
        if path.parent.name == "artifacts":
            return any(path in _files_of(self.path / name) for name in self._artifacts())
        if path.name in READ:
            return False
        return path.parent == self.path or (path.parent / "result.json").exists()

    def _artifacts(self) -> Iterator[str]:
        """The artifacts that the results of finished stages name."""
        for path in (self.path / "stages").glob("*/result.json"):
            with suppress(RunError):  # a damaged one is told by its own name
                result = read_json(path).get("result")
                if isinstance(result, dict) and isinstance(artifact := result.get("artifact"), str):
                    yield artifact

    def _cure(self, path: Path) -> str:
        if path.parent == self.path:
            return CURES.get(path.name) or _afresh(self.path)
        if path.name == "result.json":
            return "delete this file to do the stage again"
        if path.parent.name == "artifacts":
            return "delete the result.json of the stage that wrote it, to do that stage again"
        return f"delete '{path.parent / 'result.json'}' to do the stage again"

    def read_records(self, stage: int) -> list[dict[str, Any]]:
        """Reads the records of one stage; half a record at the end, which a killed run has left, is none.

        Raises:
            RunError: if the file was damaged.
        """
        if not self.records.exists():
            return []
        check_whole(self.records, CURES["records.jsonl"], grows=True)
        found = []
        for number, line in enumerate(self.records.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"line {number} is damaged ({error})",
                    place=self.records,
                    cure="delete that line",
                ) from error
            if isinstance(record, dict) and record.get("stage") == stage:
                found.append(record)
        return found

    @property
    def records(self) -> Path:
        """The file of records, one JSON object a line."""
        return self.path / "records.jsonl"

    def count_records(self) -> int:
        """Returns the number of whole records."""
        return self.records.read_bytes().count(b"\n") if self.records.exists() else 0

    def record(self, facts: Json) -> None:
        """Appends one record and sees it to the disk."""
        with writing(self.records):
            start = self.records.stat().st_size if self.records.exists() else 0
            with open(self.records, "a", encoding="utf-8") as file:
                file.write(json.dumps(_finite(facts), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            checksums.note_growth(self.records, start)

    def cut_records(self, count: int) -> None:
        """Drops all but the first `count` records, and half a record that a killed run left at the end.

        Raises:
            RunError: if there are fewer, so that some were lost; a file that is missing altogether was removed by
                somebody who was told so, and the run goes on without its records.
        """
        if not self.records.exists():
            return
        self.check_records(count)
        lines = self.records.read_bytes().splitlines(keepends=True)
        if len(lines) > count:
            with listed(self.records, self.path) as temporary:
                temporary.write_bytes(b"".join(lines[:count]))

    def check_records(self, count: int) -> None:
        """Looks whether there are at least `count` records, in a run of an older fedpress, which lists no checksums.

        Where a list knows the file, every loss is noticed by that (see `check_whole`); and a file that was deleted,
        since it was damaged, begins again with fewer records than results and checkpoints tell of.

        Raises:
            RunError: if there are fewer.
        """
        found = self.count_records()
        if found < count and self.records.exists() and not checksums.knows(self.records):
            raise RunError(
                f"corrupt (it holds {found} of {count} records)",
                place=self.records,
                cure=f"{CURES['records.jsonl']}",
            )

    def missing_records(self) -> list[str]:
        """Says that the records are gone, where results tell that there were some."""
        if self.records.exists():
            return []
        for path in (self.path / "stages").glob("*/result.json"):
            if read_json(path, cure="delete this file to do the stage again").get("records"):
                return [
                    f"{self.records} is missing: the report will show nothing of what was recorded before"
                ]
        return []

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
        facts = self.load_progress()[1]
        self.run.cut_records(facts.get("records", records))
        return float(facts.get("seconds", 0.0))

    def save_progress(self, tensors: Mapping[str, Tensor], facts: Json) -> None:
        """Saves a checkpoint inside the stage: named tensors and JSON facts in one file, replaced in one step."""
        plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        about = json.dumps({**facts, "records": self.run.count_records()})
        with listed(self._progress, self.run.path) as temporary:
            save_file(plain, temporary, metadata={"fedpress": about})

    def load_progress(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the last checkpoint inside the stage; two empty dicts if there is none.

        Raises:
            RunError: if the file is corrupt.
        """
        if not self._progress.exists():
            return {}, {}
        cure = "delete this file to do the stage again"
        check_whole(self._progress, cure, what="corrupt checkpoint")
        try:
            with safe_open(self._progress, framework="pt") as file:
                facts = json.loads(file.metadata()["fedpress"])
                return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RunError(
                f"corrupt checkpoint ({error})", place=self._progress, cure=cure
            ) from error

    @property
    def _progress(self) -> Path:
        return self.path / PROGRESS

    def finish(self, spec: ModelSpec, model: nn.Module, result: Json, *, key: str) -> Done:
        """Saves the stage's model and result; the result file, written last, marks the stage as done."""
        with writing(self.path / "model.safetensors"):
            save_model(self.path, spec, model)
            files.sync(self.path / "model.safetensors")
            files.sync(self.path / "spec.json")
        self._list(dict(result).get("artifact"))
        done = Done(dict(result), self.run.count_records())
        list_json(
            self._result,
            {"key": key, "records": done.records, "result": done.result},
            self.run.path,
        )
        self._progress.unlink(missing_ok=True)
        self.forget()
        return done

    def _list(self, artifact: object) -> None:
        """Lists the checksums of all that the stage has left, the `artifact` among it."""
        made = [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file() and path.name not in UNLISTED
        ]
        if artifact is not None:
            made += _files_of(self.run.path / str(artifact))
        with writing(self.run.path / checksums.NAME):
            for path in made:
                checksums.note(path, folder=self.run.path)

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
        cure = "delete this file to do the stage again"
        page = read_json(self._result, cure=cure)
        result, records = page.get("result"), page.get("records")
        lacks = [name for name in ("key", "records", "result") if name not in page]
        line = result if isinstance(result, dict) else {}
        needed = (*NEEDED, task_of(line).primary)
        lacks += [f"result.{name}" for name in needed if name not in line]
        if lacks or not isinstance(result, dict) or not isinstance(records, int):
            raise RunError(
                f"damaged, it lacks {', '.join(lacks) or 'a number of records'}",
                place=self._result,
                cure=cure,
            )
        return Done(result, records) if page["key"] == key else None

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
        theirs = StageFolder(
            other, other.path / "stages" / self.path.name, self.index, self.kind, self.name
        )
        done = theirs.finished(key)
        if done is None:
            return None
        for path in sorted(p for p in theirs.path.iterdir() if p.is_file()):
            check_whole(path, f"delete '{theirs._result}', and the stage is done again here")
        lines = other.read_records(self.index)
        artifact = done.result.get("artifact")
        if artifact is not None and not (other.path / str(artifact)).resolve().is_relative_to(
            other.path.resolve()
        ):
            said = str(artifact)[:80]
            raise RunError(
                f"its artifact {said!r} lies outside of the run",
                place=theirs._result,
                cure="leave out --from",
            )
        self.run.cut_records(records)
        with writing(self.path):
            shutil.copytree(
                theirs.path,
                self.path,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("result.json"),
            )
            for path in _files_of(other.path / str(artifact)) if artifact is not None else ():
                check_whole(path, f"delete '{theirs._result}', and the stage is done again here")
                target = self.run.path / path.relative_to(other.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        self._list(artifact)
        for line in lines:
            self.run.record(line)
        done = Done(done.result, self.run.count_records())
        list_json(
            self._result,
            {"key": key, "records": done.records, "result": done.result},
            self.run.path,
        )  # last
        return done


def _afresh(path: Path) -> str:
    return f"start a new run with --out NEW --from {path}, which takes over the finished stages"


def _files_of(artifact: Path) -> list[Path]:
    """An artifact, what says how to feed it, and what has its name, such as the weights of an OpenVINO graph."""
    beside = (p for p in artifact.parent.iterdir() if p.is_file())
    return sorted(p for p in beside if p.stem == artifact.stem or p.name == INPUTS)


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
