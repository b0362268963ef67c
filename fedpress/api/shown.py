"""Converts a table to text for a terminal, or to HTML for a notebook."""

from __future__ import annotations

import html
import io

from rich.console import Console

from fedpress.reports.table import Table, as_rich

WIDTH = 100  # characters: fits a notebook cell and most terminals


def as_text(table: Table) -> str:
    """Returns a table as lines of text.

    >>> print(as_text(Table(["Stage", "Size"], [["dense", "314 kB"]])))
    Stage    Size
    dense  314 kB
    """
    out = io.StringIO()
    # force_jupyter=False, because in a notebook rich would otherwise display the table instead of
    # writing it to `out`.
    Console(file=out, width=WIDTH, color_system=None, force_jupyter=False).print(as_rich(table))
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines)


def as_html(table: Table) -> str:
    """Returns a table as HTML; the text of cells is escaped.

    >>> as_html(Table(["Stage"], [["<b>"]]))
    '<table><tr><th>Stage</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    header = _row("th", table.header)
    body = "".join(_row("td", cells) for cells in table.rows)
    return f"<table>{header}{body}</table>"


def _row(tag: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
