"""Reads a table from a database: SQLite by the standard library, others through SQLAlchemy."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa

from fedpress.data.raw_table import RawTable, refuse_equal_names
from fedpress.data.settings import SQLITE, DataSettings
from fedpress.errors import Argument, DataError, first_line, suggestion

# Rows that are fetched at once. Each batch becomes Arrow columns, which need less memory than
# Python objects.
BATCH = 65_536


def read_sql(settings: DataSettings) -> RawTable:
    """Returns the result of the recipe's `query`, or all columns of its `table`.

    Nothing is written: SQLite files are opened for reading only, and other databases get no commit.

    Raises:
        DataError: if the database or the table is missing, the query fails, or a column holds both
            text and numbers.
    """
    file = _sqlite_file(settings)
    connect = _sqlite(file) if file is not None else _sqlalchemy(str(settings.address))
    with connect as database:
        batches = []
        start = 0
        names, fetched = database.rows(settings)
        # Arrow cannot join batches that have two columns of one name.
        refuse_equal_names(names, database.where)
        for rows in fetched:
            batches.append(_as_table(names, rows, start, database.where))
            start += len(rows)
    if not batches:
        raise DataError("it returned no rows", place=_key(settings), cure="check its conditions")
    table = _joined(batches, database.where)
    name = settings.table or (file.stem if file is not None else "query")
    return RawTable(name, table, database.where)


def _sqlite_file(settings: DataSettings) -> Path | None:
    """Returns the SQLite file; None if another database is meant."""
    if settings.path is not None:
        return settings.path
    address = os.path.expandvars(str(settings.address))
    if address.startswith(SQLITE):
        return Path(address.removeprefix(SQLITE)).expanduser()
    return None


def _key(settings: DataSettings) -> str:
    return "query" if settings.query is not None else "table"


class _Sqlite:
    """An open SQLite file."""

    def __init__(self, connection: sqlite3.Connection, where: str) -> None:
        self.connection = connection
        self.where = where

    def rows(self, settings: DataSettings) -> tuple[list[str], Iterator[list[Any]]]:
        """Returns the names of the columns, and batches of rows."""
        query = settings.query
        if query is None:
            name = str(settings.table)
            self._check_table(name)
            # In SQL a quotation mark within a quoted name is doubled.
            query = 'SELECT * FROM "{}"'.format(name.replace('"', '""'))
        try:
            cursor = self.connection.execute(query)
        except (sqlite3.Error, sqlite3.Warning) as error:
            raise _query_error(error, settings) from error
        if cursor.description is None:
            raise DataError("it returns no table", place="query", cure="write a SELECT")
        names = [column[0] for column in cursor.description]
        return names, iter(lambda: cursor.fetchmany(BATCH), [])

    def _check_table(self, name: str) -> None:
        listed = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        there = [row[0] for row in self.connection.execute(listed)]
        # SQLite ignores case in names.
        if name.casefold() not in [one.casefold() for one in there]:
            raise _no_table(name, there, self.where)


def _no_table(name: str, there: list[str], where: str) -> DataError:
    known = ", ".join(there[:12]) or "no table"
    return DataError(
        f"no table '{name}' in {where} (it has {known})",
        place="table",
        cure=suggestion(name, there) or "name one that it has",
    )


@contextmanager
def _sqlite(path: Path) -> Iterator[_Sqlite]:
    where = f"'{path}'"
    # SQLite would create a missing file.
    if not path.is_file():
        raise DataError(f"no database {where}", place="source 'sql'", cure="check the path")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as connection:
            # SQLite opens any file; only the first query looks into it.
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            yield _Sqlite(connection, where)
    except sqlite3.Error as error:
        raise DataError(
            f"not a readable SQLite file ({error})", place=where, cure="check the path"
        ) from error


def tables_of(path: Path) -> list[str]:
    """Returns the names of the tables of an SQLite file, the one with the most rows first.

    Raises:
        DataError: if the file cannot be read, or has no table.
    """
    with _sqlite(path) as database:
        listed = "SELECT name FROM sqlite_master WHERE type IN ('table', 'view')"
        names = [row[0] for row in database.connection.execute(listed)]
        # SQLite's own tables have such names.
        names = [name for name in names if not name.startswith("sqlite_")]
        counts = {}
        for name in names:
            quoted = name.replace('"', '""')
            counted = database.connection.execute(f'SELECT count(*) FROM "{quoted}"')
            counts[name] = counted.fetchone()[0]
    if not names:
        raise DataError("it has no table", place=f"'{path}'", cure="check the path")
    return sorted(names, key=lambda name: (-counts[name], name))


class _SqlAlchemy:
    """An open connection of SQLAlchemy."""

    def __init__(self, connection: Any, where: str) -> None:
        self.connection = connection
        self.where = where

    def rows(self, settings: DataSettings) -> tuple[list[str], Iterator[list[Any]]]:
        """Returns the names of the columns, and batches of rows."""
        import sqlalchemy

        query: Any = None
        if settings.query is None:
            schema, _, name = str(settings.table).rpartition(".")
            found = sqlalchemy.inspect(self.connection)
            there = [*found.get_table_names(schema or None), *found.get_view_names(schema or None)]
            if name not in there:
                raise _no_table(str(settings.table), there, self.where)
            query = sqlalchemy.text(
                f"SELECT * FROM {self._quoted(schema) + '.' if schema else ''}{self._quoted(name)}"
            )
        else:
            # A colon would begin a parameter, as in the time '12:30'.
            query = sqlalchemy.text(settings.query.replace(":", r"\:"))
        try:
            result = self.connection.execution_options(stream_results=True).execute(query)
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise _query_error(getattr(error, "orig", None) or error, settings) from error
        if not result.returns_rows:
            raise DataError("it returns no table", place="query", cure="write a SELECT")
        return list(result.keys()), iter(lambda: result.fetchmany(BATCH), [])

    def _quoted(self, name: str) -> str:
        quoted: str = self.connection.dialect.identifier_preparer.quote(name)
        return quoted


@contextmanager
def _sqlalchemy(address: str) -> Iterator[_SqlAlchemy]:
    try:
        import sqlalchemy
    except ImportError as error:
        raise DataError(
            "only addresses that begin with sqlite:/// are read without SQLAlchemy",
            place="address",
            cure="pip install 'fedpress[sql]', and the driver of your database",
        ) from error
    try:
        engine = sqlalchemy.create_engine(os.path.expandvars(address))
    except ImportError as error:
        raise DataError(
            f"the driver of this database is not installed ({error})",
            place="address",
            cure="install it with pip",
        ) from error
    except sqlalchemy.exc.ArgumentError as error:
        kind = address.partition(":")[0]
        raise DataError(
            f"SQLAlchemy knows no database '{kind}'",
            place="address",
            cure="write it as sqlite:///FILE.db or postgresql+psycopg://USER:$PASSWORD@HOST/NAME",
        ) from error
    # The text of this URL hides the password.
    where = f"'{engine.url.render_as_string(hide_password=True)}'"
    try:
        with engine.connect() as connection:
            yield _SqlAlchemy(connection, where)
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        raise DataError(
            f"the database does not answer ({reason})",
            place=f"address {where}",
            cure="check host, name, user and password",
        ) from error
    finally:
        engine.dispose()


def _query_error(error: BaseException, settings: DataSettings) -> DataError:
    return DataError(
        f"the database refuses it ({first_line(error)})",
        place=_key(settings),
        cure="try it in the database's own program first",
    )


def _as_table(names: list[str], rows: list[Any], start: int, where: str) -> Any:
    """Converts rows to a `pyarrow.Table`.

    Args:
        names: names of the columns.
        rows: tuples of values.
        start: number of the first row, for errors.
        where: the database, for errors.
    """
    columns = []
    for name, values in zip(names, zip(*rows, strict=True), strict=True):
        try:
            columns.append(pa.array(values))
        except (pa.ArrowException, OverflowError) as error:
            raise _mixed(name, values, start, where) from error
    return pa.Table.from_arrays(columns, names)


def _mixed(name: str, values: tuple[Any, ...], start: int, where: str) -> DataError:
    """Returns the error for a column of several types; SQLite allows any value in any column."""
    place = f"{where} column '{name}'"
    first: type | None = None
    for at, value in enumerate(values):
        if value is None:
            continue
        kind = float if isinstance(value, int | float) else type(value)
        if first is not None and kind is not first:
            return DataError(
                f"row {start + at} holds {_word(kind)}, but the rows before hold {_word(first)}",
                place=place,
                cure="correct it, or write CAST(... AS ...) in the query",
            )
        first = kind
    kinds = "numbers that are too large" if first is float else _word(first or type(None))
    return DataError(f"holds {kinds}", place=place, cure="leave it out of the query")


def _word(kind: type) -> str:
    return {float: "numbers", str: "text", bytes: "bytes"}.get(kind, kind.__name__)


def _joined(batches: list[Any], where: str) -> Any:
    try:
        return pa.concat_tables(batches, promote_options="permissive")
    except pa.ArrowException as error:
        for name in batches[0].column_names:
            kinds = {str(table.schema.field(name).type) for table in batches} - {"null"}
            if {"string"} < kinds:
                raise DataError(
                    f"some rows hold text and others {', '.join(sorted(kinds - {'string'}))}",
                    place=f"{where} column '{name}'",
                    cure=("correct it, or write CAST(... AS ...) in ", Argument("query", "SELECT")),
                ) from error
        raise DataError(
            f"rows differ in type ({first_line(error)})",
            place=where,
            cure="write CAST(... AS ...) in the query",
        ) from error
