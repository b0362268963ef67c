"""Reads and appends the records of a run: the file `records.jsonl`, one JSON object per line.

A record has the facts of one epoch or round, such as loss and accuracy.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.core import checksums
from fedpress.errors import RunError
from fedpress.workspace.atomic import (
    Json,
    check_undamaged,
    finite,
    read_json,
    replacing_with_checksum,
    writing,
)

NAME = "records.jsonl"
# The advice in errors about a damaged file.
CURE = "delete this file to go on without the records so far (models and results do not need them)"


@dataclass(frozen=True)
class Records:
    """The records of one run; `run` is its folder."""

    run: Path

    @property
    def path(self) -> Path:
        """Path of the file; it may not exist."""
        return self.run / NAME

    def of_stage(self, stage: int) -> list[dict[str, Any]]:
        """Returns the records of the stage with this position in the recipe (from 0).

        An incomplete line at the end, which a killed run may leave, is ignored.

        Raises:
            RunError: if the file is damaged.
        """
        if not self.path.exists():
            return []
        check_undamaged(self.path, CURE, grows=True)
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
        """Returns the number of complete records."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def add(self, facts: Json) -> None:
        """Appends one record; it is on the disk when the call returns."""
        # Only the new bytes get a checksum: the file may be long, and every epoch adds a line.
        with writing(self.path):
            start = self.path.stat().st_size if self.path.exists() else 0
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite(facts), allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            checksums.add_growth(self.path, start)

    def keep_first(self, count: int) -> None:
        """Keeps the first `count` records, removes all others, and an incomplete line at the end.

        Raises:
            RunError: if records were lost (see `check_count`).
        """
        # If the file is missing, the user has followed CURE and deleted it. The run continues.
        if not self.path.exists():
            return
        self.check_count(count)
        lines = self.path.read_bytes().splitlines(keepends=True)
        # The usual case has nothing to remove, so the file is not written again.
        if len(lines) > count:
            with replacing_with_checksum(self.path, self.run) as temporary:
                temporary.write_bytes(b"".join(lines[:count]))

    def check_count(self, count: int) -> None:
        """Checks that there are at least `count` records, if the file has no checksum.

        Only in runs of older versions it has none. In newer runs the checksum shows every loss (see
        `check_undamaged`), and fewer records can be correct: if the user has deleted a damaged
        file, the records start again from 0.

        Raises:
            RunError: if the file exists, has no checksum, and has fewer than `count` records.
        """
        found = self.count()
        if found < count and self.path.exists() and not checksums.has_line(self.path):
            raise RunError(
                f"corrupt (it holds {found} of {count} records)",
                place=self.path,
                cure=CURE,
            )

    def warnings(self) -> list[str]:
        """Returns a warning if the file is missing although a finished stage had records."""
        if self.path.exists():
            return []
        for path in (self.run / "stages").glob("*/result.json"):
            if read_json(path, cure="delete this file to do the stage again").get("records"):
                lost = "the report will not show the records written before now"
                return [f"{self.path} is missing: {lost}"]
        return []
