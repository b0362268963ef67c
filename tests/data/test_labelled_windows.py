"""Labelled windows of another table are those that the training made of the same rows."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch

import fedpress
from fedpress.core.inputs import shape_of
from fedpress.data.labelled_windows import labelled_windows
from fedpress.errors import DataError
from fedpress.network.data import ClientData
from fedpress.network.gate import NoPolicy
from fedpress.network.sessions import Sessions
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.deployed import offer_of
from fedpress.stages.federate.offer import Offer
from fedpress.wire.message import pack, unpack
from tests.api.test_predict_series import AIR, STEPS, air, steps, write
from tests.harness import finish

FEDERATE = '[[stage]]\nkind = "federate"\nnum_rounds = 1\n'
TABLES = {"labels": (STEPS, steps, "person", "cleo"), "forecast": (AIR, air, "station", "south")}


def rows_of(arrays):
    """Returns examples and targets in an order of their own: windows may be sorted otherwise."""
    return sorted(zip(arrays.x.flatten(1).tolist(), arrays.y.tolist(), strict=True))


@pytest.fixture(params=TABLES)
def case(request, tmp_path):
    """Returns the recipe, its data, the rows of the test client, and the client's column."""
    text, made, column, client = TABLES[request.param]
    rows = made(random.Random(0))
    write(tmp_path / "t.csv", rows)
    text = text.format(path=(tmp_path / "t.csv").as_posix()).split("[[stage]]")[0]
    recipe = recipes.load(text + FEDERATE)
    own = [row for row in rows if row[column] == client]
    return recipe, load_data(recipe), own, column


def read(case, path):
    recipe, data, *_ = case
    return labelled_windows(path, data.preparation, recipe.data, data.task)


def test_equal_rows_give_equal_windows(case, tmp_path):
    _, data, own, column = case
    write(tmp_path / "own.csv", own)
    found, _ = read(case, tmp_path / "own.csv")
    assert len(found) > 5
    assert rows_of(found) == rows_of(data.test)
    # A client's own table names no clients.
    write(tmp_path / "one.csv", [{k: v for k, v in row.items() if k != column} for row in own])
    assert rows_of(read(case, tmp_path / "one.csv")[0]) == rows_of(data.test)


def offer(case) -> Offer:
    recipe, data, *_ = case
    state = first_state(recipe, data)
    network = SimpleNamespace(labels=recipe.data.label_columns, reading=recipe.data.reading)
    made = offer_of(recipe.stage[0], state, network)
    return Offer.from_message(made.to_message({"stage": "federate"}))


def test_a_network_client_makes_windows_as_the_server(case, tmp_path):
    _, data, own, _ = case
    write(tmp_path / "own.csv", own)
    found = ClientData(tmp_path / "own.csv").arrays(offer(case))
    assert shape_of(found.x) == data.example_shape
    assert rows_of(found) == rows_of(data.test)


def test_windows_with_a_label_that_the_task_does_not_know_are_left_out(tmp_path):
    text, made, _, _ = TABLES["labels"]
    rows = made(random.Random(0))
    write(tmp_path / "t.csv", rows)
    text = text.format(path=(tmp_path / "t.csv").as_posix()).split("[[stage]]")[0] + FEDERATE
    recipe = recipes.load(text)
    data = load_data(recipe)
    own = [row for row in rows if row["person"] == "cleo"]
    strange = [
        {**row, "activity": "fly" if row["device"] == "watch" else row["activity"]} for row in own
    ]
    write(tmp_path / "own.csv", strange)
    found, left_out = labelled_windows(
        tmp_path / "own.csv", data.preparation, recipe.data, data.task
    )
    phones = [row for row in own if row["device"] == "phone"]
    write(tmp_path / "phones.csv", phones)
    wanted, none = labelled_windows(
        tmp_path / "phones.csv", data.preparation, recipe.data, data.task
    )
    assert rows_of(found) == rows_of(wanted)
    assert (left_out > 0, none) == (True, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:5], r"no series has the \d+ rows without a gap that an example takes"),
        (
            lambda rows: [{k: v for k, v in row.items() if k != "device"} for row in rows],
            "it lacks the columns device",
        ),
        (
            lambda rows: [
                {**row, "time": "soon" if at == 3 else row["time"]} for at, row in enumerate(rows)
            ],
            "soon|holds text|no number|is no date",
        ),
    ],
)
def test_a_table_that_makes_no_windows_is_refused(change, message, tmp_path):
    text, made, _, _ = TABLES["labels"]
    rows = made(random.Random(0))
    write(tmp_path / "t.csv", rows)
    text = text.format(path=(tmp_path / "t.csv").as_posix()).split("[[stage]]")[0] + FEDERATE
    recipe = recipes.load(text)
    whole = (recipe, load_data(recipe), [], "person")
    write(tmp_path / "own.csv", change([row for row in rows if row["person"] == "cleo"]))
    with pytest.raises(DataError, match=message):
        read(whole, tmp_path / "own.csv")
    # The server reads of the fault, and of no cell.
    said: list[str] = []
    client = Sessions("c", tmp_path / "c", ClientData(tmp_path / "own.csv").arrays, NoPolicy())
    client.told = said.append
    asked = offer(whole).to_message({"stage": "federate", "trial": True})
    answer = unpack(client.answer("ab" * 8, pack(asked)))
    told = json.dumps(answer.header)
    assert answer.kind == "error"
    assert "soon" not in told
    assert "own.csv" not in told
    assert said


@pytest.mark.recipe
@pytest.mark.parametrize("name", TABLES)
def test_eval_of_another_table_measures_its_windows(name, tmp_path):
    text, made, column, client = TABLES[name]
    rows = made(random.Random(0))
    write(tmp_path / "t.csv", rows)
    finish(text.format(path=(tmp_path / "t.csv").as_posix()), tmp_path / "run")
    write(tmp_path / "own.csv", [row for row in rows if row[column] == client])
    found = fedpress.evaluate(tmp_path / "run", path=tmp_path / "own.csv")
    wanted = fedpress.evaluate(tmp_path / "run")
    assert found["examples"] == wanted["examples"]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert torch.tensor(found["loss"]).isfinite()
