"""Describes the columns of a table: type, missing values, words and numbers, candidates for roles.

It looks at all rows, private ones too. So it is for the owner of the file: what a run publishes
comes from public rows only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from fedpress.data import csv, sql, tables
from fedpress.data.batches import TableFiles
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.columns import Column
from fedpress.data.describe_column import describe_column
from fedpress.data.describe_series import SeriesFacts, series_of
from fedpress.data.paths import TABLES, refuse_no_path
from fedpress.data.settings import DataSettings
from fedpress.data.streamed import is_larger_than_memory
from fedpress.data.tally import describe_batches
from fedpress.errors import DataError, suggestion

# Most classes that a column of whole numbers may have to be taken for a label of classes.
MOST_CLASSES = 20
DATABASES = (".db", ".sqlite", ".sqlite3")
"""Suffixes of SQLite files."""
LABELS = ("label", "target", "class", "outcome", "y", "diagnosis", "default", "result")
"""Usual names of the column that is to be predicted."""
DECIMAL_COMMA = r"^\s*[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+\s*$"
PEOPLE = ("client", "user", "subject", "person", "patient", "owner", "role", "speaker")
PLACES = ("hospital", "site", "device", "station", "bank", "branch", "center", "region", "city")
CLIENTS = PEOPLE + PLACES
"""Usual names of the column that says whose a row is."""


@dataclass(frozen=True)
class TableFacts:
    """What a table holds.

    Attributes:
        path: the file.
        source: its source in a recipe, such as "csv".
        delimiter: character between columns of a CSV file.
        decimal: decimal separator of the numbers in a CSV file.
        encoding: encoding of a CSV file; None if it needs none, as UTF-8.
        rows: number of rows.
        columns: the columns, in the order of the file.
        labels: names of columns that may be the label, the most likely first.
        clients: names of columns that may name the client of a row, the most likely first.
        series: how the rows follow each other in time; None if they do not.
        table: name of the table in a database; "" for a file.
        other_tables: names of the database's other tables.
    """

    path: str
    source: str
    delimiter: str
    decimal: str
    encoding: str | None
    rows: int
    columns: tuple[ColumnFacts, ...]
    labels: tuple[str, ...]
    clients: tuple[str, ...]
    series: SeriesFacts | None = None
    table: str = ""
    other_tables: tuple[str, ...] = ()

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
    """Describes a .csv, .parquet, .arrow or .feather file, or the largest table of an SQLite file.

    Raises:
        DataError: if the file cannot be read, or is no table.
    """
    path = Path(path)
    if path.suffix not in TABLES and path.suffix not in DATABASES:
        known = ", ".join((*TABLES, *DATABASES))
        raise DataError(f"'{path}' is no table", place="data", cure=f"give a file {known}")
    refuse_no_path(path, f"'{path}'")
    others: tuple[str, ...] = ()
    table: Any = None
    if path.suffix in DATABASES:
        name, *more = sql.tables_of(path)
        settings = DataSettings.model_validate({"source": "sql", "path": path, "table": name})
        table, others = sql.read_sql(settings).values, tuple(more)
    else:
        settings = _settings_of(path)
        if not is_larger_than_memory(path.stat().st_size):
            table = tables.READERS_OF_FILES[settings.source](path, settings)
    columns, settings = _in_batches(path, settings) if table is None else _of(table, settings)
    rows = columns[0].rows if columns else 0
    if not rows:
        raise DataError("there are no rows", place=f"'{path}'", cure="give a table with rows")
    clients = _clients(columns, rows)
    # Whether rows follow each other is not looked for in a table larger than memory.
    series = None if table is None else series_of(table, columns, clients, settings)
    return TableFacts(
        str(path),
        settings.source,
        settings.delimiter,
        settings.decimal,
        settings.encoding,
        rows,
        columns,
        _labels(columns, rows, series),
        clients,
        series,
        settings.table or "",
        others,
    )


def _settings_of(path: Path) -> DataSettings:
    """Returns how a file is read."""
    keys: dict[str, Any] = {"source": TABLES[path.suffix], "path": path}
    if keys["source"] == "csv":
        keys["encoding"] = csv.encoding_of(path)
        keys["delimiter"] = csv.delimiter_of(path, encoding=keys["encoding"])
    return DataSettings.model_validate(keys)


def _of(table: Any, settings: DataSettings) -> tuple[tuple[ColumnFacts, ...], DataSettings]:
    """Returns the columns of a table, and the settings with its decimal separator."""
    settings = _with_decimals(table, settings)
    columns = (Column.of(table, name, settings) for name in table.column_names)
    return tuple(describe_column(column, settings) for column in columns), settings


def _in_batches(path: Path, settings: DataSettings) -> tuple[tuple[ColumnFacts, ...], DataSettings]:
    """Returns the same as `_of` for a file that does not fit into memory."""
    files = TableFiles([path], settings)
    names = files.columns.column_names
    for batch in files.batches(names):
        settings = _with_decimals(batch, settings)
        break
    return describe_batches(files, names, settings), settings


def _with_decimals(table: Any, settings: DataSettings) -> DataSettings:
    """Returns the settings with the decimal separator of a table, or of its first rows."""
    if settings.delimiter != "," and _has_decimal_commas(table):
        return settings.model_copy(update={"decimal": ","})
    return settings


def _has_decimal_commas(table: Any) -> bool:
    """Whether a column of text holds numbers such as 3,5 or 1.234,5 and no other text."""
    for name in table.column_names:
        known = table[name].drop_null()
        if len(known) and pc.all(pc.match_substring_regex(known, DECIMAL_COMMA)).as_py():
            return True
    return False


def _rank(name: str, usual: Sequence[str]) -> int:
    """Returns the position of a usual name that `name` contains; a large number if there is none."""
    parts = name.lower().replace("-", "_").replace(" ", "_").split("_")
    places = [at for at, word in enumerate(usual) if word in parts or word + "s" in parts]
    return min(places, default=len(usual))


def _labels(
    columns: Sequence[ColumnFacts], rows: int, series: SeriesFacts | None
) -> tuple[str, ...]:
    """Returns the columns that may be predicted: the last one first, of a series the first one.

    Tables usually end with their label; what is measured over time stands before the weather.
    """
    placed = {*series.order, series.by} if series is not None else set()
    fits = []
    for at, column in enumerate(columns):
        # Of words that are nearly all different there is nothing to learn.
        few = column.type == "word" and column.distinct <= max(2, rows // 2)
        if column.name not in placed and column.distinct >= 2 and (few or column.type == "number"):
            # Of a series, numbers are forecast rather than words.
            kind = series is not None and column.type == "word"
            rank = _rank(column.name, LABELS)
            fits.append((rank, kind, at if series is not None else -at, column.name))
    return tuple(name for *_, name in sorted(fits))


def _clients(columns: Sequence[ColumnFacts], rows: int) -> tuple[str, ...]:
    """Only columns with a usual name: a column of words is more often a feature."""
    fits = [
        (_rank(column.name, CLIENTS), at, column.name)
        for at, column in enumerate(columns)
        # A client needs rows for training and for testing.
        if column.type in ("number", "integer id", "word", "text")
        and 2 <= column.distinct <= rows // 5
    ]
    return tuple(name for rank, _, name in sorted(fits) if rank < len(CLIENTS))
