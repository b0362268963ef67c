"""What a result hangs on stays the same when recipes get new keys, so that older run folders go on."""

import hashlib
import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from fedpress.pipeline import keys
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.keys import FIRST_KEYS, settings_of, stage_keys

OLD = Path(__file__).parents[1] / "data" / "v0_1_0"

# Digest of the settings and key of the last stage, as version 0.1.0 gave them.
FIRST = {
    "cifar10": ("0f40b5e0efcc51ee", "af706f8c6ef45c3b"),
    "cifar10-cpu": ("b158612fc32e5745", "5c7e0a02a0d3f5d6"),
    "compress": ("f12fa63c83941fd5", "bd4cd446614b228d"),
    "digits": ("070400d4b4f5b453", "bd30a8f6cca1680f"),
}


@pytest.mark.parametrize("name", FIRST)
def test_run_folders_of_the_first_version_belong_to_the_same_recipe(name):
    # The recipe digits of that version is kept: the one that is shipped shows another split of the data.
    old = OLD / f"{name}.toml"
    recipe = recipes.load(old.read_text("utf-8") if old.exists() else recipes.find(name))
    text = json.dumps(settings_of(recipe), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert (digest[:16], stage_keys(recipe, streams=1)[-1][:16]) == FIRST[name]


class Row(BaseModel):
    kind: Literal["row"] = "row"
    old: int = 1
    later: int = 2


class Table(BaseModel):
    kind: Literal["table"] = "table"
    name: str = "table"
    old: int = 1
    later: int = 2
    row: Row = Row()
    rows: tuple[Row, ...] = ()
    late_row: Row | None = None


@pytest.fixture
def left(monkeypatch):
    """Returns what is left of a table whose keys `old`, `row` and `rows` are those of the first version."""
    known = {"stage.x.old", "stage.x.row", "stage.x.row.old", "stage.x.rows", "stage.x.rows.old"}
    monkeypatch.setattr(keys, "FIRST_KEYS", known)

    def leave(table):
        tree = table.model_dump(mode="json")
        keys.leave_out_defaults_(tree, table, "stage.x")
        return tree

    return leave


NAMED = {"kind": "table", "name": "table"}
PLAIN = {"kind": "row", "old": 1}


def test_keys_that_came_later_are_left_out_where_they_have_their_default(left):
    assert left(Table()) == {**NAMED, "old": 1, "row": PLAIN, "rows": []}


def test_keys_that_came_later_count_where_they_say_something(left):
    table = Table(later=3, row=Row(later=4), rows=(Row(), Row(later=5)))
    rows = [PLAIN, {**PLAIN, "later": 5}]
    wanted = {"later": 3, "row": {**PLAIN, "later": 4}, "rows": rows}
    assert left(table) == {**NAMED, "old": 1, **wanted}


def test_a_row_is_told_from_another_by_its_kind_even_if_all_else_is_default(left):
    assert left(Table(late_row=Row()))["late_row"] == {"kind": "row"}


def test_the_keys_of_the_first_version_are_known():
    assert {"data.source", "stage.prune.finetune.epochs", "stage.federate.privacy"} <= FIRST_KEYS
    assert "data.encoding" not in FIRST_KEYS  # older folders than 0.1.0 have none
