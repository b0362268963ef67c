"""The records of a run, one JSON object a line: on the disk at once, and cut back to whole ones after a kill."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.core import checksums
from fedpress.errors import RunError
from fedpress.workspace.atomic import Json, check_whole, finite, listed, read_json, writing

NAME = "records.jsonl"
CURE = "delete this file to go on without the records so far (models and results do not need them)"
"""What helps against damage of the file."""


@dataclass(frozen=True)
class Records:
    """The records of the run in the folder `run`."""

    run: Path

    @property
    def path(self) -> Path:
        """The file, one JSON object a line."""
        return self.run / NAME

    def of_stage(self, stage: int) -> list[dict[str, Any]]:
        """Reads the records of one stage; half a record at the end, which a killed run has left, is none.

        Raises:
            RunError: if the file was damaged.
        """
        if not self.path.exists():
            return []
        check_whole(self.path, CURE, grows=True)
        found = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunError(
                    f"line {number} is damaged ({error})",
                    place=self.path,
                    cure="delete that line",
                ) from error
            if isinstance(record, dict) and record.get("stage") == stage:
                found.append(record)
        return found

    def count(self) -> int:
        """Returns the number of whole records."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def add(self, facts: Json) -> None:
        """Appends one record and sees it to the disk."""
        with writing(self.path):
            start = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(facts), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            checksums.note_growth(self.path, start)

    def cut(self, count: int) -> None:
        """Drops all but the first `count` records, and half a record that a killed run left at the end.

        Raises:
            RunError: if there are fewer, so that some were lost; a file that is missing altogether was removed by
                somebody who was told so, and the run goes on without its records.
        """
        if not self.path.exists():
            return
        self.check(count)
        lines = self.path.read_bytes().splitlines(keepends=True)
        if len(lines) > count:
            with listed(self.path, self.run) as temporary:
                temporary.write_bytes(b"".join(lines[:count]))

    def check(self, count: int) -> None:
        """Looks whether there are at least `count` records, in a run of an older fedpress, which lists no checksums.

        Where a list knows the file, every loss is noticed by that (see `check_whole`); and a file that was deleted,
        since it was damaged, begins again with fewer records than results and checkpoints tell of.

        Raises:
            RunError: if there are fewer.
        """
        found = self.count()
        if found < count and self.path.exists() and not checksums.knows(self.path):
            raise RunError(
                f"corrupt (it holds {found} of {count} records)",
                place=self.path,
                cure=CURE,
            )

    def missing(self) -> list[str]:
        """Says that the records are gone, where results tell that there were some."""
        if self.path.exists():
            return []
        for path in (self.run / "stages").glob("*/result.json"):
            if read_json(path, cure="delete this file to do the stage again").get("records"):
                return [
                    f"{self.path} is missing: the report will show nothing of what was recorded before"
                ]
        return []
