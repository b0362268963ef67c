"""The folder of one stage: its checkpoint while it runs, its model and result when it is done."""

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
from fedpress.errors import RunError
from fedpress.models import ModelSpec, load_model, save_model
from fedpress.tasks import task_of
from fedpress.workspace.atomic import Json, check_whole, list_json, listed, read_json, writing
from fedpress.workspace.records import Records

PROGRESS = "progress.safetensors"
INPUTS = "inputs.json"
"""In artifacts/: how raw rows of a table become the inputs of the files there."""
NEEDED = ("kind", "name", "seconds", "parameters")
"""What the line of a finished stage has at least, beside the primary metric of its task."""
UNLISTED = (PROGRESS, "result.json")
"""Files of a stage whose checksums are listed when they are written."""


@dataclass(frozen=True)
class Done:
    """What a finished stage left: its line of the result, and how many records there were at its end."""

    result: dict[str, Any]
    records: int


@dataclass(frozen=True)
class StageFolder:
    """The part of a run folder that belongs to one stage.

    Attributes:
        run: the folder of the run.
        path: the stage's own folder in it.
        index: the place of the stage in the recipe.
        kind: of the stage.
        name: of the stage.
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
        """Drops the records after the last checkpoint, or after the first `records` of them if there is none.

        What they tell of will be done again. Returns the seconds that were spent until the checkpoint.
        """
        facts = self.load_progress()[1]
        self.records.cut(facts.get("records", records))
        return float(facts.get("seconds", 0.0))

    def save_progress(self, tensors: Mapping[str, Tensor], facts: Json) -> None:
        """Saves a checkpoint inside the stage: named tensors and JSON facts in one file, replaced in one step."""
        plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        about = json.dumps({**facts, "records": self.records.count()})
        with listed(self._progress, self.run) as temporary:
            save_file(plain, temporary, metadata={"fedpress": about})

    def load_progress(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the last checkpoint inside the stage; two empty dicts if there is none.

        Raises:
            RunError: if the file is corrupt.
        """
        if not self.begun:
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
    def begun(self) -> bool:
        """Whether there is a checkpoint inside the stage."""
        return self._progress.exists()

    @property
    def _progress(self) -> Path:
        return self.path / PROGRESS

    def finish(self, spec: ModelSpec, model: nn.Module, result: Json, *, key: str) -> Done:
        """Saves the stage's model and result, and marks the stage as done."""
        with writing(self.path / "model.safetensors"):
            save_model(self.path, spec, model)
            files.sync(self.path / "model.safetensors")
            files.sync(self.path / "spec.json")
        self._list(dict(result).get("artifact"))
        done = self._mark_done(key, result)
        self._progress.unlink(missing_ok=True)
        self.forget()
        return done

    def _mark_done(self, key: str, result: Json) -> Done:
        """Writes the result file, which marks the stage as done: last, when all else is there."""
        done = Done(dict(result), self.records.count())
        page = {"key": key, "records": done.records, "result": done.result}
        list_json(self._result, page, self.run)
        return done

    def _list(self, artifact: object) -> None:
        """Lists the checksums of all that the stage has left, the `artifact` among it."""
        made = [
            path
            for path in sorted(self.path.iterdir())
            if path.is_file() and path.name not in UNLISTED
        ]
        if artifact is not None:
            made += files_of(self.run / str(artifact))
        with writing(self.run / checksums.NAME):
            for path in made:
                checksums.note(path, folder=self.run)

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

    def adopt(self, other: Path, key: str, *, records: int) -> Done | None:
        """Copies the same stage, done under the same `key`, from another run; None if that has none.

        Args:
            other: the folder of the run to copy from; nothing is changed there.
            key: see `finished`.
            records: how many records of earlier stages there are.
        """
        theirs = StageFolder(
            other, other / "stages" / self.path.name, self.index, self.kind, self.name
        )
        done = theirs.finished(key)
        if done is None:
            return None
        for path in sorted(p for p in theirs.path.iterdir() if p.is_file()):
            check_whole(path, f"delete '{theirs._result}', and the stage is done again here")
        lines = Records(other).of_stage(self.index)
        artifact = done.result.get("artifact")
        if artifact is not None and not (other / str(artifact)).resolve().is_relative_to(
            other.resolve()
        ):
            said = str(artifact)[:80]
            raise RunError(
                f"its artifact {said!r} lies outside of the run",
                place=theirs._result,
                cure="leave out --from",
            )
        self.records.cut(records)
        with writing(self.path):
            shutil.copytree(
                theirs.path,
                self.path,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("result.json"),
            )
            for path in files_of(other / str(artifact)) if artifact is not None else ():
                check_whole(path, f"delete '{theirs._result}', and the stage is done again here")
                target = self.run / path.relative_to(other)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        self._list(artifact)
        for line in lines:
            self.records.add(line)
        return self._mark_done(key, done.result)


def files_of(artifact: Path) -> list[Path]:
    """Returns an artifact, what says how to feed it, and what has its name: OpenVINO's weights lie beside a graph."""
    beside = (p for p in artifact.parent.iterdir() if p.is_file())
    return sorted(p for p in beside if p.stem == artifact.stem or p.name == INPUTS)
