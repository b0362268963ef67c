"""`RawInputs`: examples that were made of raw data, such as rows or recordings, to be predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fedpress.data.paths import similar_path
from fedpress.errors import DataError

UnknownWords = Literal["error", "zeros"]
"""What an unknown word does: it is an error, or it becomes zeros as in the training."""
Table = tuple[list[str], list[list[Any]]]
"""The names of the columns, and the rows."""


@dataclass(frozen=True, eq=False)
class RawInputs:
    """Examples that were made of raw data.

    Attributes:
        x: the inputs before standardisation [n, ...].
        ignored: columns that were given, and are neither inputs nor labels.
        names: columns that tell the examples apart, such as "file" or "time" -> a value for each.
        columns: for rows of a table: returns column of inputs -> its cells [n, 1], for a file that
            prepares them itself (`new_rows.raw_columns`). Else None.
        tokens: the token numbers of each text; else empty.
        table: makes the table of predictions from the answers [n, ...], if it is not a row for each
            example with its answers.
    """

    x: Tensor
    ignored: tuple[str, ...] = ()
    names: Mapping[str, list[Any]] = field(default_factory=dict)
    columns: Callable[[], dict[str, np.ndarray]] | None = None
    tokens: tuple[tuple[int, ...], ...] = ()
    table: Callable[[Tensor], Table] | None = None


def files_of(given: Any, endings: frozenset[str], what: str) -> tuple[list[Path], list[str]]:
    """Returns files in the order of their paths, and a short name for each.

    Args:
        given: a file, a folder, or a list of files. A folder is searched with its subfolders.
        endings: endings of the files in a folder, such as ".wav"; other files are ignored.
        what: what the files are, for errors, such as "recordings".

    Raises:
        DataError: if there is no such file or folder, or the folder has no such files.
    """
    if isinstance(given, list | tuple):
        files = [Path(one) for one in given]
        for file in files:
            _refuse_missing(file)
        return files, [str(file) for file in files]
    path = Path(given)
    _refuse_missing(path)
    if path.is_file():
        return [path], [path.name]
    files = []
    for file in sorted(path.rglob("*")):
        # Operating systems add hidden files to folders, for example .DS_Store.
        if file.suffix.lower() in endings and not file.name.startswith("."):
            files.append(file)
    if not files:
        raise DataError(
            f"the folder has no {what}",
            place=f"'{path}'",
            cure=f"give a folder with files that end in {', '.join(sorted(endings))}",
        )
    return files, [str(file.relative_to(path)) for file in files]


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        raise DataError("no such file or folder", place=f"'{path}'", cure=similar_path(path))
