"""Raw rows become the inputs that the training saw, to the bit, and what leaves says how."""

import csv
import json
import random
from dataclasses import replace
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedpress.data import DataSettings, Preparation, load, prepare
from fedpress.data.preparation import InputColumn
from fedpress.data.raw_rows import read_rows
from fedpress.errors import DataError

JOBS = ("cook", "nurse", "smith")


def write(path, *, decimal=".", delimiter=",", gaps=True):
    """Writes 120 rows of four sites; site s0 is public, s3 tests; rows of s3 have gaps and a word of their own."""
    chance = random.Random(1)
    rows = []
    for i in range(120):
        site = f"s{i % 4}"
        age = f"{chance.uniform(20, 80):.3f}".replace(".", decimal)
        job = "diver" if site == "s3" and i % 3 == 0 else chance.choice(JOBS)
        row = {
            "age": age,
            "job": job,
            "insured": chance.choice(["true", "false"]),
            "visits": str(chance.randrange(9)),
        }
        if gaps and i % 5 == 0:
            row[chance.choice(["age", "job", "insured", "visits"])] = chance.choice(["", "NA"])
        rows.append(row | {"site": site, "y": chance.choice(["ill", "well"])})
    with open(path, "w", newline="") as file:
        lines = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        lines.writeheader()
        lines.writerows(rows)
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def ask(path, **keys):
    keys = {"source": "csv", "missing": "mean", **keys}
    return DataSettings(
        path=path,
        client_column="site",
        label_column="y",
        public_clients=["s0"],
        test_clients=["s3"],
        **keys,
    )


@pytest.mark.parametrize("unknown", [None, "other"])
@pytest.mark.parametrize(("decimal", "delimiter"), [(".", ","), (",", ";")])
def test_prepared_rows_are_those_of_the_training_to_the_bit(tmp_path, unknown, decimal, delimiter):
    rows = write(tmp_path / "t.csv", decimal=decimal, delimiter=delimiter)
    data = load(ask(tmp_path / "t.csv", unknown=unknown, decimal=decimal, delimiter=delimiter), 0)
    (tmp_path / "preparation.json").write_text(json.dumps(data.preparation.to_json()))
    about = Preparation.read(tmp_path / "preparation.json")
    assert about == data.preparation
    assert about.class_names == data.class_names == ("ill", "well", *([unknown] if unknown else []))
    got = prepare([row for row in rows if row["site"] == "s3"], about)
    assert got.dtype == torch.float32
    assert torch.equal(got, data.preprocess(data.test.x))


@pytest.mark.parametrize(
    "keys", [{}, {"words": {"level": [1, 3, 2], "job": ["smith", "cook"]}, "unknown": "other"}]
)
def test_rows_of_a_parquet_file_are_given_as_they_are(tmp_path, keys):
    chance = np.random.default_rng(0)
    table = pa.table(
        {
            "job": chance.choice(JOBS, 80),
            "dose": pa.array(
                [None if i % 9 == 0 else float(i) / 7 for i in range(80)], pa.float32()
            ),
            "level": chance.integers(1, 5, 80),
            "old": chance.integers(0, 2, 80).astype(bool),
            "site": [f"s{i % 4}" for i in range(80)],
            "y": chance.integers(0, 2, 80),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    data = load(ask(tmp_path / "t.parquet", source="parquet", **keys), 0)
    rows = [row for row in table.to_pylist() if row["site"] == "s3"]
    assert torch.equal(prepare(rows, data.preparation), data.preprocess(data.test.x))
    assert [c.kind for c in data.preparation.columns] == [
        "words",
        "number",
        "words" if keys else "number",
        "truth",
    ]


def test_what_leaves_holds_columns_words_fills_and_means_and_no_private_word(tmp_path):
    write(tmp_path / "t.csv")
    data = load(ask(tmp_path / "t.csv", unknown="other"), 0)
    page = data.preparation.to_json()
    assert [column["name"] for column in page["columns"]] == ["age", "job", "insured", "visits"]
    assert page["columns"][1]["words"] == [*JOBS, "other"]
    assert "diver" not in json.dumps(page)
    assert page["standardised_by_the_file"] is False
    assert page["mean"] == list(data.preprocess.mean)
    assert page["class_names"] == ["ill", "well", "other"]
    before = page
    text = (tmp_path / "t.csv").read_text().splitlines()
    private = [
        line.replace(",s1,", "1,s1,").replace("cook", "baker") if ",s1," in line else line
        for line in text
    ]
    (tmp_path / "t.csv").write_text("\n".join(private))
    assert load(ask(tmp_path / "t.csv", unknown="other"), 0).preparation.to_json() == before


def test_one_mean_for_all_inputs_is_written_for_each(tmp_path):
    write(tmp_path / "t.csv")
    about = load(ask(tmp_path / "t.csv", mean=(2.0,), std=(3.0,)), 0).preparation
    assert about.mean == (2.0,) * about.width
    assert about.std == (3.0,) * about.width


ABOUT = Preparation(
    (InputColumn("age", "number"), InputColumn("job", "words", JOBS, "refused")),
    ("",),
    mean=(0.0,) * 4,
    std=(1.0,) * 4,
)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"age": "4"}, "row 1: there is no column 'job'"),
        (
            {"age": "", "job": "cook"},
            r"row 1: column 'age' has no value of its kind \(number\).* fill it",
        ),
        ({"age": "young", "job": "cook"}, "row 1: column 'age' has no value of its kind"),
        ({"age": float("nan"), "job": "cook"}, "row 1: column 'age' has no value"),
        ({"age": 1e60, "job": "cook"}, "row 1: column 'age' is infinite"),
        ({"age": [3], "job": "cook"}, "row 1: column 'age' holds list; expected a number"),
        ({"age": 3, "job": "diver"}, "row 1: column 'job' has a word that is not on its list"),
        ({"age": 3, "job": ["cook"]}, "row 1: column 'job' holds list; expected a word"),
    ],
)
def test_a_row_that_the_training_would_not_have_taken_is_refused(row, said):
    with pytest.raises(DataError, match=said):
        prepare([{"age": 3, "job": "cook"}, row], ABOUT)


def test_no_rows_give_no_inputs():
    assert prepare([], ABOUT).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean": [1.0]}, "give as many values as in mean"),
        ({"columns": [{"name": "a", "kind": "colour", "fill": None}]}, "is of the kind 'colour'"),
        (
            {"columns": [{"name": "a", "kind": "number", "fill": [1, 2]}]},
            "2 values to fill 1 inputs",
        ),
        ({"columns": 3}, "corrupt"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, said):
    path = tmp_path / "preparation.json"
    path.write_text(json.dumps(ABOUT.to_json() | change))
    with pytest.raises(DataError, match=said):
        Preparation.read(path)
    with pytest.raises(DataError, match="cannot be read"):
        Preparation.read(tmp_path / "none.json")


def test_an_unknown_word_may_be_zeros():
    about = replace(ABOUT, columns=(ABOUT.columns[0], replace(ABOUT.columns[1], unknown="zeros")))
    assert prepare([{"age": 3, "job": "diver"}], about).tolist() == [[3.0, 0.0, 0.0, 0.0]]


def test_rows_with_dates_in_memory_are_read():
    day = InputColumn("day", "date", parts=("days",))
    about = Preparation((day,), mean=(0.0,), std=(1.0,))
    found = read_rows([{"day": datetime(2000, 1, 3)}], about, "error")
    assert found.x.tolist() == [[2.0]]
