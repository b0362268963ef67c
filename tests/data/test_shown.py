"""What a report may show of a data set: public rows, and clients only if it is asked to."""

from dataclasses import replace

import pytest

from fedpress.data import DataSettings, load
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.shown import MOST_CLIENTS, shown


@pytest.fixture(scope="module")
def digits():
    return load(DataSettings(source="digits", num_clients=3, public_share=0.2), 0)


def test_classes_are_counted_in_public_rows_and_in_clients_if_they_are_asked_for(digits):
    found = shown(digits, rows="public", clients=True)
    assert found["labels"] == digits.public.y.bincount(minlength=10).tolist()
    assert list(found["clients"]) == ["c0", "c1", "c2"]
    assert found["clients"]["c1"] == digits.clients["c1"].y.bincount(minlength=10).tolist()
    hidden = shown(digits, rows="public", clients=False)
    assert hidden == {key: value for key, value in found.items() if "clients" not in key}


def test_columns_that_private_rows_described_are_left_out_of_what_is_public(digits):
    everything = ColumnFacts("age", "number", 0, 9, rows=9)
    data = replace(digits, columns=(everything, replace(everything, name="job", part="public")))
    names = {
        rows: [one["name"] for one in shown(data, rows=rows, clients=False)["columns"]]
        for rows in ("public", "all")
    }
    assert names == {"public": ["job"], "all": ["age", "job"]}


def test_a_made_up_client_and_more_clients_than_fit_are_not_shown(digits):
    alone = replace(digits, clients={"c0": digits.clients["c0"]})
    assert "clients" not in shown(alone, rows="public", clients=True)
    many = replace(digits, clients={f"c{at}": digits.clients["c0"] for at in range(100)})
    found = shown(many, rows="public", clients=True)
    assert len(found["clients"]) == MOST_CLIENTS
    assert found["more_clients"] == 100 - MOST_CLIENTS
