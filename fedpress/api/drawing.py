"""Draws the data of a recipe as a page: the columns of a table, and the classes of each client."""

from __future__ import annotations

from pathlib import Path

from fedpress.data import FederatedData
from fedpress.data.column_facts import Rows
from fedpress.data.shown import shown
from fedpress.pipeline.recipe import Recipe
from fedpress.reports.html import write_data_page


def draw_data(recipe: Recipe, data: FederatedData, target: Path) -> Path:
    """Writes a page about the data of a recipe, for the owner of the data.

    It shows all rows; if a stage has differential privacy, public rows alone.

    Args:
        recipe: the recipe.
        data: its data, with the columns of a table described.
        target: the HTML file.

    Raises:
        RunError: if there is nothing to draw, or the file cannot be written.
    """
    rows: Rows = "public" if recipe.private else "all"
    counts = {"private": sum(map(len, data.clients.values())), "public": len(data.public)}
    counts |= {"validation": len(data.validation), "test": len(data.test)}
    facts = [f"{len(data.clients):,} clients"]
    facts += [f"{count:,} {part}" for part, count in counts.items()]
    told = shown(data, rows=rows, clients=not recipe.private)
    return write_data_page(told, recipe.name, facts, target)
