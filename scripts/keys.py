"""Writes fedpress/cli/keys.txt, from which shells complete keys; run it when a key has changed."""

from __future__ import annotations

from pathlib import Path

from fedpress.data.settings import BUILT_IN
from fedpress.models import ARCHITECTURES
from fedpress.pipeline.recipe import key_tables
from fedpress.tasks import TASKS
from fedpress.training.device import NAMES

FILE = Path(__file__).parents[1] / "fedpress" / "cli" / "keys.txt"
OPEN = {
    "device": NAMES,
    "data.source": BUILT_IN,
    "data.task": TASKS,
    "model.architecture": ARCHITECTURES,
}
"""Keys that take other words too, and those that a shell offers."""
PLAIN = {"recipe": "", "data": "data.", "model": "model."}


def text() -> str:
    """Returns a line for each key: its name, the words that it may be, its meaning, between tabs."""
    lines = []
    for table in key_tables():
        if not table.is_stage and table.word not in PLAIN:
            continue
        beginning = f"stage.{table.word}." if table.is_stage else PLAIN[table.word]
        for row in table.rows:
            meaning, _, choices = row.meaning.partition("one of ")
            words = "true,false" if row.default in ("true", "false") else choices.replace(" ", "")
            words = words or ",".join(OPEN.get(f"{beginning}{row.key}", ()))
            lines.append(f"{beginning}{row.key}\t{words}\t{meaning.rstrip('; ')}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
