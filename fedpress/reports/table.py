"""A table as plain text, and how a terminal shows it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Table:
    """A header and rows of text, all of one length.

    The first column holds names, the others numbers.
    """

    header: list[str]
    rows: list[list[str]]


def as_rich(table: Table, *, words: Collection[str] = ()) -> RichTable:
    """Returns a table for a terminal.

    Text in the first column and in the columns `words` may break into lines.
    """
    shown = RichTable(box=None, header_style="bold", pad_edge=False)
    for at, title in enumerate(table.header):
        text = at == 0 or title in words
        justify: Literal["left", "right"] = "left" if text else "right"
        shown.add_column(title, justify=justify, no_wrap=not text, overflow="fold")
    add_rows_(shown, table)
    return shown


def add_rows_(shown: RichTable, table: Table) -> None:
    """Adds the rows as plain text: a name with [brackets] is no markup."""
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
