"""Reads labelled examples of one's own for a network that was trained on other data.

To add a kind of raw data, write a reader and a row in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpress.core.examples import Arrays
from fedpress.data.labelled_rows import labelled_rows
from fedpress.data.labelled_texts import labelled_texts
from fedpress.data.labelled_windows import labelled_windows
from fedpress.data.paths import TABLES
from fedpress.data.preparation import TABLE, Preparation
from fedpress.data.preparation_parts import SeriesPart, TextPart
from fedpress.data.settings import DataSettings
from fedpress.tasks.base import Task

Reader = Callable[[Path, Preparation, DataSettings, Task], tuple[Arrays, int]]
"""Takes the file, the preparation of the training, the settings and the network's task. Returns the
examples, not standardised, and how many were left out (see `labelled_rows`)."""


@dataclass(frozen=True)
class Kind:
    """How examples of one kind are read.

    Attributes:
        read: the function that reads them.
        suffixes: suffixes of the files that it reads.
        unit: what is an example, such as "rows".
        folders: whether it reads a folder of such files, too.
    """

    read: Reader
    suffixes: tuple[str, ...]
    unit: str
    folders: bool = False

    def takes(self, path: Path) -> bool:
        """Returns whether `path` is such a file or folder."""
        return self.folders if path.is_dir() else path.suffix in self.suffixes


KINDS: dict[str, Kind] = {
    TABLE: Kind(labelled_rows, tuple(TABLES), "rows"),
    SeriesPart.key: Kind(labelled_windows, tuple(TABLES), "windows"),
    TextPart.key: Kind(labelled_texts, (".txt",), "sequences", folders=True),
}
"""Kind of a preparation -> how examples are read for it."""
SUFFIXES = tuple(dict.fromkeys(suffix for kind in KINDS.values() for suffix in kind.suffixes))
"""Suffixes of all files that are read."""
