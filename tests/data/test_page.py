"""docs/data.md names every key of `[data]`, and each of its worked examples runs as it stands there."""

import re
import tomllib
from pathlib import Path

import pytest

from fedpress.data import DataSettings
from tests import pages

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def section(heading):
    found = [block for block in pages.blocks("docs/data.md") if block.section == heading]
    assert found, f"docs/data.md has no section {heading!r}"
    return found


def test_every_key_has_its_row_and_says_what_the_command_line_says():
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", TEXT, re.MULTILINE)
    wanted = {name: field.description for name, field in DataSettings.model_fields.items()}
    assert dict(rows) == wanted


def test_the_table_with_all_lists_is_a_table_of_data():
    (block,) = section("Words, missing values, unknown classes")
    settings = DataSettings.model_validate(tomllib.loads(block.body)["data"])
    assert settings.classes == ("healthy", "ill")


@pytest.mark.recipe
def test_a_file_becomes_predictions_by_the_commands_of_the_page(shell, capsys):
    blocks = section("From a file to predictions")
    pages.do(blocks, shell)
    (commands,) = [block.body.splitlines() for block in blocks if block.language == "sh"]
    assert len(commands) < 10
    answers = Path("answers.csv").read_text().splitlines()[1:]
    rows = Path("visits.csv").read_text().splitlines()[1:]
    pairs = zip(answers, rows, strict=True)
    right = sum(answer.split(",")[0] == row.split(",")[-1] for answer, row in pairs)
    assert right / len(rows) > 0.85


@pytest.mark.recipe
def test_the_table_as_csv_is_checked_run_and_read_back(shell, capsys):
    names = pages.do(section("A CSV file"), shell)
    first, second = (stage["accuracy"] for stage in names["run"].result["stages"][:2])
    assert first > 0.85
    assert second > 0.85
    assert 0 < names["run"].result["final"]["epsilon"] <= 8
    assert names["about"].class_names == ("healthy", "ill")
    assert names["about"].width == 5
    assert Path("runs/visits/report.html").is_file()
    assert Path("runs/visits/artifacts/model.onnx").is_file()


@pytest.mark.recipe
@pytest.mark.parametrize(
    ("heading", "run", "least"),
    [
        ("Parquet files", "runners", 0.8),
        ("Arrow and Feather files", "pumps", 0.85),
        ("A database", "loans", 0.8),
        ("Hugging Face data sets", "moods", 0.85),
        ("NumPy arrays", "waves", 0.8),
        ("Windows over a series", "steps", 0.85),
        ("Image folders", "photos", 0.9),
        ("Sound", "tones", 0.9),
        ("A Python function", "sensors", 0.85),
        ("Types of columns", "rentals", 0.85),
        ("Private statistics", "clinics", 0.75),
    ],
)
def test_the_other_sources_are_run(heading, run, least, shell):
    from fedpress import Run

    pages.do(section(heading), shell)
    assert Run(Path("runs") / run).result["final"]["accuracy"] > least


def test_the_table_of_a_forecast_is_a_table_of_data():
    block = section("Windows over a series")[-1]
    settings = DataSettings.model_validate(tomllib.loads(block.body)["data"])
    assert settings.series.horizon == (1, 24)


@pytest.mark.recipe
def test_texts_are_learned(shell):
    from fedpress import Run

    pages.do(section("Text"), shell)
    final = Run(Path("runs") / "plays").result["final"]
    # Guessing by frequency alone has a perplexity above 10.
    assert final["perplexity"] < 3


@pytest.mark.recipe
def test_data_in_memory_are_federated(shell, capsys):
    names = pages.do(section("Data in memory"), shell)
    assert names["together"].after["accuracy"] > 0.8
