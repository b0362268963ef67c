"""The folder of one stage: it has a checkpoint while the stage runs, then model and result.

A run does the stages of a recipe, such as "train" and "prune". Each stage has a folder in the run
folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpress.core import checksums, files
from fedpress.core.log import logger
from fedpress.errors import RunError
from fedpress.models import ModelSpec, load_model, save_model
from fedpress.tasks import task_of
from fedpress.workspace.atomic import (
    Json,
    check_undamaged,
    read_json,
    replacing_with_checksum,
    write_json_with_checksum,
    writing,
)
from fedpress.workspace.records import Records

log = logger(__name__)

PROGRESS = "progress.safetensors"
# File beside a model that says how raw table rows become its inputs.
PREPARATION = "preparation.json"
# Its name in artifacts/ of runs of fedpress 0.2.0 and older.
OLD_PREPARATION = "inputs.json"
# Keys in the result of every finished stage, in addition to the primary metric of its task.
NEEDED = ("kind", "name", "seconds", "parameters")
# Files that get their checksum when they are written, and not when the stage finishes.
CHECKSUMMED_BEFORE = (PROGRESS, "result.json")


@dataclass(frozen=True)
class Done:
    """A finished stage.

    Attributes:
        result: the stage's entry in the result of the run.
        records: number of records of the whole run when the stage ended.
    """

    result: dict[str, Any]
    records: int


@dataclass(frozen=True)
class StageFolder:
    """The part of a run folder that belongs to one stage.

    Attributes:
        run: the folder of the run.
        path: the stage's own folder in it.
        index: position of the stage in the recipe, from 0.
        kind: kind of the stage, such as "prune".
        name: name of the stage; by default its kind.
    """

    run: Path
    path: Path
    index: int
    kind: str
    name: str

    @property
    def records(self) -> Records:
        """The records of the whole run."""
        return Records(self.run)

    def record(self, **facts: JsonValue) -> None:
        """Appends a record of this stage to the run's records."""
        self.records.add({"stage": self.index, "kind": self.kind, "name": self.name, **facts})

    def begin(self, records: int) -> float:
        """Removes the records of steps that the resumed stage will repeat.

        They are the records after the last checkpoint; without a checkpoint, all records of this
        stage.

        Args:
            records: number of records of earlier stages. Without a checkpoint only these stay.

        Returns:
            The seconds spent until the checkpoint.
        """
        facts = self.load_progress()[1]
        self.records.keep_first(facts.get("records", records))
        return float(facts.get("seconds", 0.0))

    def save_progress(self, tensors: Mapping[str, Tensor], facts: Json) -> None:
        """Saves a checkpoint atomically in one file: named tensors, and facts as JSON values."""
        copies = _apart(tensors)
        # The number of records tells `begin` which records come after the checkpoint.
        metadata = json.dumps({**facts, "records": self.records.count()})
        with replacing_with_checksum(self._progress, self.run) as temporary:
            save_file(copies, temporary, metadata={"fedpress": metadata})
        log.debug("checkpoint written: %s", self._progress)

    def load_progress(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and facts of the last checkpoint; both are empty if there is none.

        Raises:
            RunError: if the checkpoint is corrupt.
        """
        if not self.begun:
            return {}, {}
        cure = "delete this file to do the stage again"
        check_undamaged(self._progress, cure, what="corrupt checkpoint")
        try:
            with safe_open(self._progress, framework="pt") as file:
                facts = json.loads(file.metadata()["fedpress"])
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, facts
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RunError(
                f"corrupt checkpoint ({error})", place=self._progress, cure=cure
            ) from error

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return self._progress.exists()

    @property
    def _progress(self) -> Path:
        return self.path / PROGRESS

    def finish(self, spec: ModelSpec, model: nn.Module, result: Json, *, key: str) -> Done:
        """Saves the stage's model and result, and marks the stage as finished.

        Then it deletes the checkpoint and the folder `memory`.

        Args:
            spec: the model's spec.
            model: the model after the stage.
            result: the stage's entry in the run's result.
            key: hash of everything that the result depends on, such as settings and data.
        """
        with writing(self.path / "model.safetensors"):
            save_model(self.path, spec, model)
            # Both files must be on the disk before the result file, which marks them as complete.
            files.sync(self.path / "model.safetensors")
            files.sync(self.path / "spec.json")
        self._note_checksums(dict(result).get("artifact"))
        done = self._mark_done(key, result)
        # Deleted last: if the process is killed before this line, the checkpoint is still there.
        self._progress.unlink(missing_ok=True)
        self.forget()
        return done

    def _mark_done(self, key: str, result: Json) -> Done:
        """Writes the result file. It marks the stage as finished, so it is written last."""
        done = Done(dict(result), self.records.count())
        content = {"key": key, "records": done.records, "result": done.result}
        write_json_with_checksum(self._result, content, self.run)
        return done

    def _note_checksums(self, artifact: object) -> None:
        """Adds the checksums of the stage's files and of its `artifact` to the run's list."""
        made = []
        for path in sorted(self.path.iterdir()):
            if path.is_file() and path.name not in CHECKSUMMED_BEFORE:
                made.append(path)
        if artifact is not None:
            made += files_of(self.run / str(artifact))
        with writing(self.run / checksums.NAME):
            for path in made:
                checksums.add_line(path, folder=self.run)

    @property
    def memory(self) -> Path:
        """Folder with the states of simulated clients. It has private data: do not share it."""
        return self.path / "memory"

    def forget(self) -> None:
        """Removes the folder `memory`."""
        shutil.rmtree(self.memory, ignore_errors=True)

    def finished(self, key: str) -> Done | None:
        """Returns the result if the stage is finished and has the same `key`, else None.

        Args:
            key: hash of everything that the result depends on: the settings, the seed and all
                earlier stages (see `fedpress.pipeline.keys.stage_keys`).

        Raises:
            RunError: if the result file was damaged.
        """
        if not self._result.exists():
            return None
        cure = "delete this file to do the stage again"
        content = read_json(self._result, cure=cure)
        result, records = content.get("result"), content.get("records")
        missing = [name for name in ("key", "records", "result") if name not in content]
        line = result if isinstance(result, dict) else {}
        needed = (*NEEDED, task_of(line).primary)
        missing += [f"result.{name}" for name in needed if name not in line]
        if missing or not isinstance(result, dict) or not isinstance(records, int):
            raise RunError(
                f"damaged: {', '.join(missing) or 'a valid number of records'} is missing",
                place=self._result,
                cure=cure,
            )
        return Done(result, records) if content["key"] == key else None

    @property
    def _result(self) -> Path:
        return self.path / "result.json"

    def load(self) -> tuple[ModelSpec, nn.Module]:
        """Loads the model of the finished stage."""
        return load_model(self.path)

    def adopt(self, other: Path, key: str, *, records: int, same_data: bool = True) -> Done | None:
        """Copies this stage from another run, if it is finished there and has the same `key`.

        Args:
            other: folder of the other run; it is not changed.
            key: hash of everything that the result depends on.
            records: number of records of earlier stages in this run.
            same_data: whether both runs began with the same data; `key` knows their settings only.

        Returns:
            The copied result; None if the other run has no finished stage with this key.

        Raises:
            RunError: if the other run began with other data, or a file of its stage is damaged or
                outside of its folder.
        """
        theirs = StageFolder(
            other, other / "stages" / self.path.name, self.index, self.kind, self.name
        )
        done = theirs.finished(key)
        if done is None:
            return None
        if not same_data:
            raise RunError(
                "its data have other content than those of this run",
                place=f"'{other}'",
                cure="give the data that it began with, or do not take stages over from it",
            )
        cure = f"delete '{theirs._result}'; then this run does the stage itself"
        # The files in the stage's folder are checked before anything is copied. The exported model
        # is checked below.
        for path in sorted(theirs.path.iterdir()):
            if path.is_file():
                check_undamaged(path, cure)
        lines = Records(other).of_stage(self.index)
        artifact = theirs._artifact_of(done)

        self.records.keep_first(records)
        with writing(self.path):
            # The result file comes last, by `_mark_done`, when everything else was copied.
            shutil.copytree(
                theirs.path,
                self.path,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("result.json"),
            )
            for path in files_of(artifact) if artifact is not None else ():
                check_undamaged(path, cure)
                target = self.run / path.relative_to(other)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        self._note_checksums(done.result.get("artifact"))
        for line in lines:
            self.records.add(line)
        return self._mark_done(key, done.result)

    def _artifact_of(self, done: Done) -> Path | None:
        """Returns the path of the stage's artifact; None if the stage made no artifact."""
        name = done.result.get("artifact")
        if name is None:
            return None
        path = self.run / str(name)
        # The run may come from a stranger, and its result may name any file of this user.
        if not path.resolve().is_relative_to(self.run.resolve()):
            raise RunError(
                f"its artifact {str(name)[:80]!r} lies outside of the run",
                place=self._result,
                cure="leave out --from",
            )
        return path


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `tensors` on the CPU, contiguous, and no two of them in one storage.

    safetensors refuses tensors that share memory. The others are not copied: a large model would
    be in memory once more.
    """
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().to("cpu").contiguous()
        if here.untyped_storage().data_ptr() in seen:
            here = here.clone()
        seen.add(here.untyped_storage().data_ptr())
        apart[name] = here
    return apart


def files_of(artifact: Path) -> list[Path]:
    """Returns all files of an exported model: those with its stem, and `preparation.json`.

    Example: OpenVINO writes the graph to `model.xml` and the weights to `model.bin`.
    `preparation.json` says how a row of a table becomes the model's input.
    """
    found = []
    beside = (PREPARATION, OLD_PREPARATION)
    for path in artifact.parent.iterdir():
        if path.is_file() and (path.stem == artifact.stem or path.name in beside):
            found.append(path)
    return sorted(found)
