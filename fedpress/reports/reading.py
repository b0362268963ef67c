"""Reads a run folder: whatever an unfinished run has left so far, and nothing else."""

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
    """What a run folder holds; a part that is not there (yet) is empty."""

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
        return bool(self.result.get("finished", self.result.get("final")))

    @property
    def name(self) -> str:
        """The recipe's name as the run knows it, else the name of the folder."""
        return str(self.result.get("recipe") or self.settings.get("name") or self.path.name)

    @property
    def stages(self) -> list[Json]:
        """The measured stages of `result.json`, in order."""
        return stages_of(self.result)


def stages_of(result: Json) -> list[Json]:
    """Returns the stages of a `result.json`; anything that is not a table is left out."""
    stages = result.get("stages")
    if not isinstance(stages, list):
        return []
    return [stage for stage in stages if isinstance(stage, dict)]


def name_of(line: Json) -> str:
    """Returns the name of the stage that a line or record is of.

    >>> name_of({"kind": "train", "name": "dense"}), name_of({"kind": "train"}), name_of({})
    ('dense', 'train', '?')
    """
    return str(line.get("name") or line.get("kind") or "?")


def records_by_stage(records: list[Json]) -> Iterator[list[Json]]:
    """Yields the records of one stage after the other.

    Of an epoch or round done twice the later one counts.
    """
    for _, group in groupby(sorted(records, key=_stage), key=_stage):
        steps: dict[tuple[Any, ...], Json] = {}
        for at, record in enumerate(group):
            # A killed run does its last step again and writes a second record of it.
            steps[_step(record, at)] = record
        yield list(steps.values())


def _step(record: Json, at: int) -> tuple[Any, ...]:
    """Returns what names a step: only records of epochs and rounds may be written twice."""
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
            f"a table was expected, got {type(value).__name__}",
            place=path,
            cure="restore the file or move it away",
        )
    return value


def _lines(path: Path) -> list[Json]:
    lines = [line for line in _text_of_records(path).split("\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break  # the run was killed while it wrote this line, or is writing it now
            raise RunError(
                f"line {number} is damaged ({error})", place=path, cure="delete that line"
            ) from error
        if isinstance(record, dict):
            records.append(record)
    return records


def _text_of_records(path: Path) -> str:
    """The text of the records.

    A kill can cut a letter in two, so a torn end is no reason to fail.
    """
    check_undamaged(path, "move it away to draw the report without its curves", grows=True)
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RunError(
            f"cannot be read ({error})", place=path, cure="restore the file or move it away"
        ) from error
