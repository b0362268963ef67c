"""A recipe says how a column is understood: numbers, words, codes and dates, in training and for raw rows."""

import csv
import json
import math
from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import fedpress
from fedpress.data import DataSettings, Preparation, load, prepare
from fedpress.data.dates import (
    date_block,
    dates_of_cells,
    dates_of_text,
    likely_form,
    parts_of,
)
from fedpress.data.preparation import InputColumn
from fedpress.errors import DataError, RecipeError

ROWS = 60


def lines(**columns):
    """Returns a CSV text of 60 rows; each column is a function of the row number, or a list."""
    columns = {
        "who": lambda at: "ab"[at % 2],
        **columns,
        "y": lambda at: ["ill", "well"][at % 3 == 0],
    }
    rows = [[str(make(at)) for make in columns.values()] for at in range(ROWS)]
    return "\n".join([",".join(columns), *(",".join(row) for row in rows)])


def read(path, **keys):
    keys = {"client_column": "who", "label_column": "y", "public_clients": ("a",), **keys}
    return load(DataSettings(source=path.suffix[1:], path=path, **keys), 0)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        lines(
            zip=lambda at: f"00{at % 3}7",
            ward=lambda at: at % 4,
            since=lambda at: date(2019, 12, 25) + timedelta(days=at),
            seen=lambda at: datetime(2024, 2, 27, 22, 30) + timedelta(hours=5 * at),
            born=lambda at: (date(1960, 1, 31) + timedelta(days=400 * at)).strftime("%d.%m.%Y"),
        )
    )
    return path


TYPES = {
    "zip": "integer id",
    "ward": "word",
    "since": "date",
    "seen": "date",
    "born": "date %d.%m.%Y",
}


def slow_date(at, *, hour):
    """The inputs of a date as the documentation says them, computed with the standard library alone."""
    month = (at.month - 1) / 12
    found = [(at - datetime(2000, 1, 1)) / timedelta(days=1)]
    for turn in [month, at.weekday() / 7, *([(at.hour * 60 + at.minute) / 1440] if hour else [])]:
        found += [math.sin(2 * math.pi * turn), math.cos(2 * math.pi * turn)]
    return found


def test_columns_become_the_inputs_that_their_types_say(table):
    data = read(table, types=TYPES)
    found = {column.name: column for column in data.preparation.columns}
    assert found["zip"].words == ("0007", "0017", "0027")
    # Only clients a's even rows are public.
    assert found["ward"].words == ("0", "2")
    assert found["since"].parts == found["born"].parts == ("days", "month", "weekday")
    assert found["seen"].parts == ("days", "month", "weekday", "hour")
    assert found["born"].form == "%d.%m.%Y"
    assert data.example_shape == (3 + 2 + 5 + 7 + 5,)


def test_dates_become_days_and_circles_as_the_standard_library_computes_them(table):
    with open(table, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["who"] == "b"]
    wanted = []
    for row in rows:
        born = datetime.strptime(row["born"], "%d.%m.%Y")
        wanted.append(
            [
                *slow_date(datetime.fromisoformat(row["since"]), hour=False),
                *slow_date(datetime.fromisoformat(row["seen"]), hour=True),
                *slow_date(born, hour=False),
            ]
        )
    data = read(table, types=TYPES, drop_columns=("zip", "ward"), mean=(0.0,), std=(1.0,))
    got = prepare(rows, data.preparation)
    torch.testing.assert_close(got, torch.tensor(wanted))


@pytest.mark.parametrize("missing", ["error", "mean"])
def test_raw_rows_with_dates_and_codes_are_those_of_the_training_to_the_bit(
    table, tmp_path, missing
):
    if missing == "mean":
        table.write_text(table.read_text().replace("2020-01-02", "NA").replace("2020-01-05", ""))
    data = read(table, types=TYPES, missing=missing, test_share=0.5)
    (tmp_path / "p.json").write_text(json.dumps(data.preparation.to_json()))
    about = Preparation.read(tmp_path / "p.json")
    assert about == data.preparation
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    got = {tuple(row) for row in prepare(rows, about).tolist()}
    seen = torch.cat([part.x for part in (*data.clients.values(), data.public, data.test)])
    assert {tuple(row) for row in data.preprocess(seen).tolist()} <= got


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_arrow_dates_are_understood_of_themselves_and_as_local_time(tmp_path, unit):
    moments = [datetime(2024, 7, 1, 23, 30, tzinfo=UTC) + timedelta(days=at) for at in range(ROWS)]
    zone = pa.timestamp(unit, "Europe/Berlin")
    columns = {
        "who": ["a", "b"] * (ROWS // 2),
        "day": pa.array([moment.date() for moment in moments]),
        "seen": pa.array(moments, pa.timestamp(unit, "UTC")).cast(zone),
        "y": [0, 1, 1] * (ROWS // 3),
    }
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    data = read(path, mean=(0.0,), std=(1.0,))
    rows = pa.table(columns).to_pylist()
    wanted = [
        [
            *slow_date(datetime.combine(moment.date(), datetime.min.time()), hour=False),
            # In July it is 1:30 of the next day in Berlin.
            *slow_date(moment.replace(tzinfo=None) + timedelta(hours=2), hour=True),
        ]
        for moment in moments
    ]
    torch.testing.assert_close(prepare(rows, data.preparation), torch.tensor(wanted))


def test_codes_are_the_same_words_in_csv_and_in_parquet(tmp_path):
    numbers = [at % 3 for at in range(ROWS)]
    floats = [None if at % 7 == 0 else float(at % 3) for at in range(ROWS)]
    table = pa.table(
        {"who": ["a", "b"] * 30, "ward": numbers, "code": floats, "y": [0, 1, 1, 0] * 15}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    keys = {"types": {"ward": "word", "code": "integer id"}, "missing": "mean"}
    about = read(tmp_path / "t.parquet", **keys).preparation
    assert [column.words for column in about.columns] == [("0", "1", "2")] * 2
    text = "\n".join(
        ["who,ward,code,y"]
        + [
            f"{'ab'[at % 2]},{numbers[at]},{'' if floats[at] is None else numbers[at]},{'0110'[at % 4]}"
            for at in range(ROWS)
        ]
    )
    (tmp_path / "t.csv").write_text(text)
    assert read(tmp_path / "t.csv", **keys).preparation.columns == about.columns


def test_clients_and_classes_that_are_codes_keep_their_leading_zeros(tmp_path):
    (tmp_path / "t.csv").write_text(
        "bank,x,kind\n" + "".join(f"0{at % 2},{at},00{at % 3}\n" for at in range(ROWS))
    )
    data = read(
        tmp_path / "t.csv",
        client_column="bank",
        label_column="kind",
        public_clients=("00",),
        types={"bank": "integer id", "kind": "word"},
    )
    assert list(data.clients) == ["01"]
    assert data.class_names == ("000", "001", "002")
    listed = read(
        tmp_path / "t.csv",
        client_column="bank",
        label_column="kind",
        public_clients=("00",),
        types={"bank": "integer id", "kind": "word"},
        classes=("002", "001", "000"),
    )
    assert len(listed.clients["01"]) == len(data.clients["01"])


def test_a_text_column_of_arrow_becomes_numbers_if_the_recipe_says_so(tmp_path):
    columns = {
        "who": ["a", "b"] * 30,
        "dose": [f"{at},5" for at in range(ROWS)],
        "y": [0, 1, 1] * 20,
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = read(tmp_path / "t.parquet", types={"dose": "number"}, decimal=",", delimiter=";")
    assert data.preparation.columns == (InputColumn("dose", "number"),)
    assert sorted(data.clients["b"].x[:, 0].tolist())[0] >= 1.5


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (
            {"since": "number"},
            "column 'since': line 2 holds '2019-12-25', which is no number; write a number there",
        ),
        (
            {"born": "date"},
            "column 'born': line 2 holds '31.01.1960', which is no date; .* "
            r'types = \{ "born" = "date %d.%m.%Y" \}',
        ),
        (
            {"since": "date", "born": "date %m/%d/%Y"},
            "column 'born': line 2 holds '31.01.1960', which is no date of the form %m/%d/%Y",
        ),
        (
            {"born": "integer id"},
            "'31.01.1960', which is no whole number; correct it, or set types",
        ),
        (
            {"since": "word", "seen": "date", "born": "word", "ward": "date"},
            "column 'ward': line 2 holds '0', which is no date",
        ),
        ({"born": "word"}, "feature column 'since': it holds dates; set types = .* to learn"),
    ],
)
def test_a_value_of_another_type_is_named_with_line_value_and_cure(table, types, said):
    with pytest.raises(DataError, match=said):
        read(table, types=types)


def test_a_date_in_a_private_row_that_is_none_is_found_too(table):
    table.write_text(table.read_text().replace("2020-01-05", "2020-02-30"))
    with pytest.raises(DataError, match="line 13 holds '2020-02-30', which is no date"):
        read(table, types=TYPES)


def test_ids_that_are_all_different_are_no_feature(tmp_path):
    (tmp_path / "t.csv").write_text(lines(id=lambda at: at, size=lambda at: at / 7))
    with pytest.raises(DataError, match=r"all its 27 ids differ.*; set drop_columns=\(\"id\",\)"):
        read(tmp_path / "t.csv", types={"id": "integer id"})


def test_many_words_that_are_dates_are_told_to_be_dates(tmp_path):
    path = tmp_path / "t.csv"
    days = [(date(2020, 1, 1) + timedelta(days=at)).strftime("%d/%m/%Y") for at in range(300)]
    path.write_text("since,y\n" + "".join(f"{day},{at % 2}\n" for at, day in enumerate(days)))
    with pytest.raises(DataError, match=r'if these are dates, set types = .*"date %d/%m/%Y"'):
        read(path, client_column=None, public_clients=(), public_share=0.7)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"types": {"a": "dat"}}, "no type 'dat' .* did you mean 'date'"),
        ({"types": {"a": "date %d"}}, "'%d' does not say where year, month and day are"),
        ({"source": "digits", "types": {"a": "word"}}, "source 'digits' is no table"),
        ({"types": {"label": "number"}}, "column 'label' is predicted"),
        ({"types": {"a": "number"}, "words": {"a": ["x"]}}, "column 'a' is of the type number"),
    ],
)
def test_types_that_cannot_be_are_refused_in_the_recipe(keys, said):
    table = {"source": "csv", "path": "t.csv", **keys}
    recipe = {"name": "x", "data": table, "model": {"architecture": "mlp"}, "stage": []}
    with pytest.raises(RecipeError, match=said):
        fedpress.check(recipe)


def test_offsets_count_in_utc_and_what_is_no_date_is_null():
    texts = ["2024-05-01", " 2024-05-01T12:00:00+02:00", "2024-05-01 10:00:00Z", "soon", None]
    found = dates_of_text(pa.chunked_array([texts])).to_pylist()
    ten = datetime(2024, 5, 1, 10)
    assert found == [datetime(2024, 5, 1), ten, ten, None, None]
    # Unlike C's strptime, which makes the 3rd of March of it.
    assert dates_of_text(pa.chunked_array([["31.02.2001"]]), "%d.%m.%Y").null_count == 1


def test_cells_may_be_dates_of_python_and_numpy_and_texts():
    east = timezone(timedelta(hours=2))
    cells = [date(2024, 5, 1), datetime(2024, 5, 1, 12, tzinfo=east), "2024-05-01", 3, None]
    found = dates_of_cells(cells).to_pylist()
    assert found == [
        datetime(2024, 5, 1),
        datetime(2024, 5, 1, 12),
        datetime(2024, 5, 1),
        None,
        None,
    ]
    assert dates_of_cells([20240501], "%Y%m%d").to_pylist() == [datetime(2024, 5, 1)]
    about = Preparation((InputColumn("d", "date", parts=("days",)),), mean=(0.0,), std=(1.0,))
    nanos = np.datetime64("2000-01-02T12:00:00.000000001", "ns")
    assert prepare([{"d": nanos}], about).tolist() == [[1.5]]


def test_hours_are_inputs_only_if_a_public_row_has_one():
    days = pa.chunked_array([pa.array([datetime(2024, 5, 1), None])])
    assert parts_of(days) == ("days", "month", "weekday")
    assert len(parts_of(pa.chunked_array([pa.array([datetime(2024, 5, 1, 1)])]))) == 4
    assert len(parts_of(days[1:])) == 4
    assert np.isnan(date_block(days, parts_of(days))[1]).all()


def test_the_form_of_dates_is_guessed_only_if_all_fit():
    assert likely_form(pa.chunked_array([["03.04.2020", "13.04.2020"]])) == "%d.%m.%Y"
    assert likely_form(pa.chunked_array([["04/13/2020", "04/03/2020"]])) == "%m/%d/%Y"
    assert likely_form(pa.chunked_array([["13.04.2020 12:30"]])) == "%d.%m.%Y %H:%M"
    assert likely_form(pa.chunked_array([["13.04.2020", "x"]])) is None
    assert likely_form(pa.chunked_array([pa.array([None], pa.string())])) is None


@pytest.mark.recipe
def test_predict_takes_raw_rows_with_dates_and_names_a_wrong_one(table, shell):
    (table.parent / "x.toml").write_text(
        f"""
        name = "x"
        [data]
        source = "csv"
        path = "t.csv"
        client_column = "who"
        label_column = "y"
        public_clients = ["a"]
        types = {json.dumps(TYPES).replace(":", "=")}
        [model]
        architecture = "mlp"
        [[stage]]
        kind = "train"
        epochs = 1
        batch_size = 16
        """
    )
    assert shell("run", "x.toml", "--out", "run").code == 0
    (table.parent / "new.csv").write_text(
        "\n".join(table.read_text().splitlines()[:4]).replace("2019-12-26", "Boxing Day")
    )
    said = shell("predict", "run", "new.csv", "--unknown", "zeros")
    assert said.code == 2
    assert (
        "line 3 of 'new.csv': column 'since' has 'Boxing Day', which is no date; write it as"
        in (" ".join(said.err.split()))
    )
    (table.parent / "new.csv").write_text("\n".join(table.read_text().splitlines()[:4]))
    assert shell("predict", "run", "new.csv", "--unknown", "zeros").code == 0


@pytest.mark.recipe
def test_windows_in_the_order_of_dates_of_another_form_are_predicted(tmp_path, shell):
    days = [(date(2024, 1, 31) + timedelta(days=at)).strftime("%d.%m.%Y") for at in range(200)]
    text = "day,x,y\n" + "".join(f"{day},{at % 9},{at % 9 > 4}\n" for at, day in enumerate(days))
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "x.toml").write_text(
        """
        name = "x"
        [data]
        source = "csv"
        path = "t.csv"
        label_column = "y"
        num_clients = 2
        public_share = 0.5
        types = { day = "date %d.%m.%Y" }
        series = { window = 2, order_column = "day" }
        [model]
        architecture = "mlp"
        [[stage]]
        kind = "train"
        epochs = 1
        """
    )
    assert shell("run", "x.toml", "--out", "run").code == 0
    # Sorted as text, the first of May would come before the second of February.
    said = shell("predict", "run", "t.csv", "--out", "a.csv")
    assert (said.code, said.err) == (0, "")
    found = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["day"] for row in found[:2]] == ["01.02.2024", "03.02.2024"]
