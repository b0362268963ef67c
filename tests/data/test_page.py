"""docs/data.md names every key of `[data]`, and its example is a table that is read."""

import re
import tomllib
from pathlib import Path

from fedpress.data import DataSettings

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


def test_every_key_has_its_row():
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert rows == [*DataSettings.model_fields]


def test_the_example_is_a_table_of_data():
    (text,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    settings = DataSettings.model_validate(tomllib.loads(text)["data"])
    assert settings.classes == ("healthy", "ill")
