"""Reads the files of a run folder for the report, whether the run is finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from fedpress.errors import RunError
from fedpress.workspace.atomic import check_undamaged

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """The content of a run folder. If a file is missing, its attribute is empty.

    Attributes:
        path: the folder.
        recipe: text of `recipe.toml`.
        settings: the recipe with all defaults filled in (`settings.json`).
        environment: versions, machine and command (`environment.json`).
        records: a dictionary for each epoch, round or step (`records.jsonl`).
        result: the measured numbers of each finished stage (`result.json`).
        ledger: the privacy spent, one entry for each use of private data (`ledger.json`).
        before: the measured numbers of the model that was given to a command such as
            `fedpress prune` (`before.json`).
    """

    path: Path
    recipe: str = ""
    settings: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    records: list[Json] = field(default_factory=list)
    result: Json = field(default_factory=dict)
    ledger: Json = field(default_factory=dict)
    before: Json = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the last stage has ended."""
        # A result of version 0.1 has no "finished". It has "final" once the last stage has ended.
        return bool(self.result.get("finished", self.result.get("final")))

    @property
    def name(self) -> str:
        """The name of the recipe; if the recipe has no name, the name of the folder."""
        return str(self.result.get("recipe") or self.settings.get("name") or self.path.name)

    @property
    def stages(self) -> list[Json]:
        """The results of the finished stages (`result.json`), in order."""
        return stages_of(self.result)


def stages_of(result: Json) -> list[Json]:
    """Returns the results of the stages in a `result.json`; damaged entries are left out."""
    stages = result.get("stages")
    if not isinstance(stages, list):
        return []
    return [stage for stage in stages if isinstance(stage, dict)]


def name_of(line: Json) -> str:
    """Returns the name of the stage that a result or a record belongs to.

    >>> name_of({"kind": "train", "name": "dense"}), name_of({"kind": "train"}), name_of({})
    ('dense', 'train', '?')
    """
    return str(line.get("name") or line.get("kind") or "?")


def records_by_stage(records: list[Json]) -> Iterator[list[Json]]:
    """Yields the list of records of each stage, in the order of the stages."""
    # Sorted, because groupby joins only neighbours, and a resumed run appends its records.
    for _, group in groupby(sorted(records, key=_stage), key=_stage):
        steps: dict[tuple[Any, ...], Json] = {}
        for at, record in enumerate(group):
            # A run that was killed and resumed repeats its last epoch or round. The second record
            # then replaces the first record.
            steps[_step(record, at)] = record
        yield list(steps.values())


def _step(record: Json, at: int) -> tuple[Any, ...]:
    """Returns a key that is equal for two records of the same epoch or round."""
    # A record with neither epoch nor round is never repeated, so it gets a key of its own.
    if "epoch" not in record and "round" not in record:
        return ("once", at)
    # As text: a damaged record may hold a list there, which cannot be a key.
    return tuple(str(record.get(key)) for key in ("step", "cut", "epoch", "round"))


def _stage(record: Json) -> int:
    stage = record.get("stage")
    return stage if isinstance(stage, int) else -1


def read_run(path: Path) -> Run:
    """Reads the run folder at `path`, finished or not.

    Raises:
        RunError: if `path` is no run folder, or one of its files is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunError(
            "no such folder",
            place=path,
            cure="give the folder that `fedpress run --out` wrote",
        )
    run = Run(
        path=path.resolve(),
        recipe=_text(path / "recipe.toml"),
        settings=_table(path / "settings.json"),
        environment=_table(path / "environment.json"),
        records=_lines(path / "records.jsonl"),
        result=_table(path / "result.json"),
        ledger=_table(path / "ledger.json"),
        before=_table(path / "before.json"),
    )
    # One of these files is enough: a run that was just started has no result.
    if not (run.recipe or run.settings or run.records or run.result):
        raise RunError(
            (
                "not a run folder, it holds none of recipe.toml, settings.json, records.jsonl "
                "and result.json"
            ),
            place=path,
            cure="give the folder that `fedpress run --out` wrote",
        )
    return run


def read_what_can_be(path: Path) -> tuple[Run, list[str]]:
    """Reads a run folder while the run may change it; raises no error for damaged files.

    Checksums are not compared; they matter only when a run is resumed or reported.

    Returns:
        The run, and a sentence for each damaged file. The attribute of a damaged file is empty.
    """
    notes: list[str] = []

    def table(name: str) -> Json:
        text = _raw_text(path / name)
        try:
            value = json.loads(text) if text else {}
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            return value
        notes.append(f"{name} is damaged, or not complete yet.")
        return {}

    run = Run(
        path=path.resolve(),
        recipe=_raw_text(path / "recipe.toml"),
        settings=table("settings.json"),
        environment=table("environment.json"),
        records=_undamaged_lines(_raw_text(path / "records.jsonl"), notes),
        result=table("result.json"),
        ledger=table("ledger.json"),
        before=table("before.json"),
    )
    if not path.is_dir():
        notes.append("The folder is not there any more.")
    return run, notes


def _raw_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return ""


def _undamaged_lines(text: str, notes: list[str]) -> list[Json]:
    """Returns the complete records, and adds a sentence to `notes` if lines are damaged."""
    records = []
    damaged = 0
    # The last part is empty, or a line that is being written.
    for line in text.split("\n")[:-1]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif line.strip():
            damaged += 1
    if damaged:
        lines = "line is" if damaged == 1 else "lines are"
        notes.append(f"records.jsonl: {damaged} {lines} damaged and left out.")
    return records


def _text(path: Path) -> str:
    check_undamaged(path, "restore the file or move it away")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(
            f"cannot be read ({error})", place=path, cure="restore the file or move it away"
        ) from error


def _table(path: Path) -> Json:
    text = _text(path)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(
            f"damaged JSON ({error})", place=path, cure="restore the file or move it away"
        ) from error
    if not isinstance(value, dict):
        raise RunError(
            f"expected a JSON object, got {type(value).__name__}",
            place=path,
            cure="restore the file or move it away",
        )
    return value


def _lines(path: Path) -> list[Json]:
    # Not splitlines(): it also splits at characters that a name in the data may contain.
    lines = [line for line in _text_of_records(path).split("\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break  # the last line may be incomplete: the run is writing it, or was killed
            raise RunError(
                f"line {number} is damaged ({error})", place=path, cure="delete that line"
            ) from error
        if isinstance(record, dict):
            records.append(record)
    return records


def _text_of_records(path: Path) -> str:
    """Returns the text of `records.jsonl`, to which a running stage may still append."""
    check_undamaged(path, "move it away to draw the report without its curves", grows=True)
    try:
        # "replace": a killed run may have written only half of the last character's bytes.
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(
            f"cannot be read ({error})", place=path, cure="restore the file or move it away"
        ) from error
