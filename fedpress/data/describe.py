"""Describes the columns of a table: type, missing values, words and numbers, candidates for roles.

It looks at all rows, private ones too. So it is for the owner of the file: what a run publishes
comes from public rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from fedpress.data import csv, tables
from fedpress.data.cells import is_number, is_word
from fedpress.data.columns import Column
from fedpress.data.features import MOST_STRAY, MOST_WORDS
from fedpress.data.labelled_rows import TABLES
from fedpress.data.lines import place_of
from fedpress.data.paths import refuse_no_path
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, suggestion

Type = Literal["number", "integer id", "word", "text", "date", "image", "list"]
"""Type of a column, as fedpress understands it."""

# Number of bars of a histogram.
BARS = 12
# Most classes that a column of whole numbers may have to be taken for a label of classes.
MOST_CLASSES = 20
LABELS = ("label", "target", "class", "outcome", "y", "diagnosis", "default", "result")
"""Usual names of the column that is to be predicted."""
PEOPLE = ("client", "user", "subject", "person", "patient", "owner", "role", "speaker")
PLACES = ("hospital", "site", "device", "station", "bank", "branch", "center", "region", "city")
CLIENTS = PEOPLE + PLACES
"""Usual names of the column that says whose a row is."""


@dataclass(frozen=True)
class ColumnFacts:
    """What a column holds.

    Attributes:
        name: name of the column.
        type: its type.
        missing: number of cells without a value.
        distinct: number of different values.
        words: the most frequent words with their counts; empty for numbers.
        numbers: least, median and largest number; empty for words.
        histogram: counts of numbers in intervals of equal width between least and largest.
        note: what is unusual, such as a text in a column of numbers; "" if nothing is.
    """

    name: str
    type: Type
    missing: int
    distinct: int
    words: tuple[tuple[str, int], ...] = ()
    numbers: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class TableFacts:
    """What a table holds.

    Attributes:
        path: the file.
        source: its source in a recipe, such as "csv".
        delimiter: character between columns of a CSV file.
        decimal: decimal separator of the numbers in a CSV file.
        rows: number of rows.
        columns: the columns, in the order of the file.
        labels: names of columns that may be the label, the most likely first.
        clients: names of columns that may name the client of a row, the most likely first.
    """

    path: str
    source: str
    delimiter: str
    decimal: str
    rows: int
    columns: tuple[ColumnFacts, ...]
    labels: tuple[str, ...]
    clients: tuple[str, ...]

    def column(self, name: str) -> ColumnFacts:
        """Returns one column.

        Raises:
            DataError: if there is none of this name.
        """
        for column in self.columns:
            if column.name == name:
                return column
        names = [column.name for column in self.columns]
        raise DataError(
            f"it has no column '{name}'",
            place=f"'{self.path}'",
            cure=suggestion(name, names, f"it has {', '.join(names[:12])}"),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns all facts as plain JSON values."""
        return asdict(self)


def describe_file(path: str | Path) -> TableFacts:
    """Describes a .csv, .parquet, .arrow or .feather file.

    Raises:
        DataError: if the file cannot be read, or is no table.
    """
    path = Path(path)
    if path.suffix not in TABLES:
        raise DataError(
            f"'{path}' is no table", place="data", cure=f"give a file {', '.join(TABLES)}"
        )
    refuse_no_path(path, f"'{path}'")
    keys: dict[str, Any] = {"source": TABLES[path.suffix], "path": path}
    if keys["source"] == "csv":
        keys["delimiter"] = csv.delimiter_of(path)
    settings = DataSettings.model_validate(keys)
    table = tables.READERS_OF_FILES[settings.source](path, settings)
    if not table.num_rows:
        raise DataError("there are no rows", place=f"'{path}'", cure="give a table with rows")
    if settings.delimiter != "," and _has_decimal_commas(table):
        settings = settings.model_copy(update={"decimal": ","})
    columns = tuple(_described(Column.of(table, n, settings), settings) for n in table.column_names)
    return TableFacts(
        str(path),
        settings.source,
        settings.delimiter,
        settings.decimal,
        table.num_rows,
        columns,
        _labels(columns, table.num_rows),
        _clients(columns, table.num_rows),
    )


def bars(counts: Sequence[int]) -> str:
    """Draws counts as one line of text.

    >>> bars([0, 1, 4, 8])
    ' ▁▄█'
    """
    marks = " ▁▂▃▄▅▆▇█"
    most = max(counts, default=0) or 1
    # Rounded up, so that only an empty interval has no bar.
    return "".join(marks[-(-count * 8 // most)] for count in counts)


def _has_decimal_commas(table: Any) -> bool:
    """Whether a column of text holds numbers such as 3,5 and no other text."""
    for name in table.column_names:
        known = table[name].drop_null()
        if len(known) and pc.all(pc.match_substring_regex(known, r"^\s*[+-]?\d+,\d+\s*$")).as_py():
            return True
    return False


def _described(column: Column, settings: DataSettings) -> ColumnFacts:
    values, note = _typed(column, settings)
    kind = values.type
    missing = int(pc.sum(pc.is_null(column.values, nan_is_null=True)).as_py() or 0)
    if types.is_struct(kind):
        return ColumnFacts(column.name, "image", missing, 0)
    if types.is_nested(kind):
        return ColumnFacts(column.name, "list", missing, 0)
    distinct = len(values.drop_null().unique())
    if types.is_temporal(kind):
        return ColumnFacts(column.name, "date", missing, distinct)
    if is_word(kind) or types.is_boolean(kind):
        if distinct > MOST_WORDS:
            return ColumnFacts(column.name, "text", missing, distinct)
        return ColumnFacts(column.name, "word", missing, distinct, _counts(values))
    if not (is_number(kind) or types.is_null(kind)):
        return ColumnFacts(column.name, "text", missing, distinct, note=f"it holds {kind}")
    return _of_numbers(column.name, values, missing, note)


def _typed(column: Column, settings: DataSettings) -> tuple[Any, str]:
    """Returns the values with their type, and a note if a column of numbers has other text."""
    values = column.typed()
    if not (column.text and is_word(values.type)):
        return values, ""
    count, first = column.stray_texts(np.arange(len(values)))
    if not 0 < count <= MOST_STRAY * (len(values) - values.null_count):
        return values, ""
    word = str(column.values[first].as_py())[:40]
    note = f"{count:,} of its cells are no numbers, such as '{word}' in {place_of(first, settings)}"
    return column.cast(pa.float64()), note


def _of_numbers(name: str, values: Any, missing: int, note: str) -> ColumnFacts:
    distinct = len(values.drop_null().unique())
    found = values.cast(pa.float64()).drop_null().to_numpy()
    found = found[np.isfinite(found)]
    spread: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    if len(found):
        spread = (float(found.min()), float(np.median(found)), float(found.max()))
        histogram = tuple(np.histogram(found, bins=min(BARS, max(1, distinct)))[0].tolist())
    kind: Type = "integer id" if _is_id(name, found, distinct) else "number"
    return ColumnFacts(
        name, kind, missing, distinct, numbers=spread, histogram=histogram, note=note
    )


def _is_id(name: str, found: np.ndarray, distinct: int) -> bool:
    """Whether whole numbers only tell rows apart: every row has another one."""
    if distinct < len(found) or len(found) < 2 or not (found == np.round(found)).all():
        return False
    lower = name.lower()
    named = lower in ("id", "index", "row", "nr", "no") or lower.endswith(("_id", " id"))
    return named or bool((np.diff(found) == 1).all())


def _counts(values: Any) -> tuple[tuple[str, int], ...]:
    counted = [
        (str(one["values"]), int(one["counts"])) for one in values.value_counts().to_pylist()
    ]
    known = [pair for pair in counted if pair[0] != "None"]
    return tuple(sorted(known, key=lambda pair: (-pair[1], pair[0])))


def _rank(name: str, usual: Sequence[str]) -> int:
    """Returns the position of a usual name that `name` contains; a large number if there is none."""
    parts = name.lower().replace("-", "_").replace(" ", "_").split("_")
    places = [at for at, word in enumerate(usual) if word in parts or word + "s" in parts]
    return min(places, default=len(usual))


def _labels(columns: Sequence[ColumnFacts], rows: int) -> tuple[str, ...]:
    fits = [
        (_rank(column.name, LABELS), -at, column.name)
        for at, column in enumerate(columns)
        if column.type in ("number", "word") and 2 <= column.distinct <= max(2, rows // 2)
    ]
    return tuple(name for _, _, name in sorted(fits))


def _clients(columns: Sequence[ColumnFacts], rows: int) -> tuple[str, ...]:
    """Only columns with a usual name: a column of words is more often a feature."""
    fits = [
        (_rank(column.name, CLIENTS), at, column.name)
        for at, column in enumerate(columns)
        # A client needs rows for training and for testing.
        if column.type in ("number", "word", "text") and 2 <= column.distinct <= rows // 5
    ]
    return tuple(name for rank, _, name in sorted(fits) if rank < len(CLIENTS))
