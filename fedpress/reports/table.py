"""A table of text cells, which can be shown on a terminal or on a page."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A header and rows of text; every row has as many cells as the header.

    The first column has names. `as_rich` takes the other columns for numbers, such as "13.4 MB",
    unless it is told that they have text.
    """

    header: list[str]
    rows: list[list[str]]


def as_rich(table: Table, *, text_columns: Collection[str] = ()) -> RichTable:
    """Returns a table for a terminal.

    Args:
        table: what to show.
        text_columns: titles of further columns with text. Text is aligned left and may be broken
            into lines; numbers are aligned right and never broken.
    """
    shown = RichTable(box=None, header_style="bold", pad_edge=False)
    for at, title in enumerate(table.header):
        text = at == 0 or title in text_columns
        justify: Literal["left", "right"] = "left" if text else "right"
        shown.add_column(title, justify=justify, no_wrap=not text, overflow="fold")
    add_rows_(shown, table)
    return shown


def add_rows_(shown: RichTable, table: Table) -> None:
    """Adds the rows of `table` to `shown`, a table of the library rich, in place."""
    for row in table.rows:
        # As `Text`: rich would read a name such as "[data]" as markup and hide it.
        shown.add_row(*(Text(cell) for cell in row))
