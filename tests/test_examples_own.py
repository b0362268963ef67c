"""The pages of the examples say how a file of one's own becomes predictions, and that works."""

import csv
from pathlib import Path

import pytest

from tests import pages

OWN = {
    "examples/city/README.md": "With a file of your own",
    "examples/keyboard/README.md": "With a folder of your own",
}
"""Page -> its section about own data."""


def section(page):
    found = [block for block in pages.blocks(page) if block.section == OWN[page]]
    assert found, f"{page} has no section {OWN[page]!r}"
    return found


@pytest.mark.parametrize("page", OWN)
def test_own_data_take_fewer_than_ten_commands(page):
    lines = [block.body for block in section(page) if block.language == "sh"]
    found = list(pages.commands("".join(lines)))
    assert 0 < len(found) < 10
    assert {"run", "predict"} <= {words[1] for words in found}


@pytest.mark.recipe
def test_counters_of_bridges_become_the_next_day_of_each(shell, capsys):
    pages.do(section("examples/city/README.md"), shell)
    assert Path("runs/bikes/report.html").is_file()
    with open("next.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    last = [row for row in rows if row["Zeitpunkt"] == "2024-10-01T23:00:00+02:00"]
    assert len(last) == 4 * 24
    assert {row["Brücke"] for row in last} == {row["Brücke"] for row in rows}


@pytest.mark.recipe
def test_a_folder_of_texts_becomes_the_next_characters(shell, capsys):
    pages.do(section("examples/keyboard/README.md"), shell)
    assert Path("runs/typed/report.html").is_file()
    said = shell("predict", "runs/typed/artifacts/model.onnx", "new.txt", "--tokens", "8")
    assert said.out.splitlines()[1].startswith("new.txt,e,")  # "üb" becomes "über"
