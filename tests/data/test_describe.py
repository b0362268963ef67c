"""A table is described as a person sees it: types, gaps, words, numbers, and what may be the label."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedpress.data.column_facts import bars
from fedpress.data.describe import describe_file
from fedpress.errors import DataError

TEXT = """id,hospital,age,job,when,note,outcome
1,north,30,cook,2024-01-01,a,ill
2,north,,nurse,2024-01-02,b,well
3,south,50,cook,2024-01-03,c,ill
4,south,60,cook,2024-01-04,d,well
5,north,70,NA,2024-01-05,e,ill
6,north,80,cook,2024-01-06,f,well
7,south,90,cook,2024-01-07,g,ill
8,south,40,cook,2024-01-08,h,well
9,south,41,cook,2024-01-08,h,well
10,south,42,cook,2024-01-08,h,well
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(TEXT)
    return path


def test_types_gaps_words_and_numbers_are_those_of_the_file(table):
    facts = describe_file(table)
    types = {column.name: column.type for column in facts.columns}
    assert types == {
        "id": "integer id",
        "hospital": "word",
        "age": "number",
        "job": "word",
        "when": "date",
        "note": "word",
        "outcome": "word",
    }
    assert facts.rows == 10
    assert facts.column("age").missing == 1
    assert facts.column("age").numbers == (30.0, 50.0, 90.0)
    assert sum(facts.column("age").histogram) == 9
    assert facts.column("job").words == (("cook", 8), ("nurse", 1))
    assert facts.column("job").missing == 1
    assert facts.column("when").dates == ("2024-01-01", "2024-01-08")
    assert sum(facts.column("when").histogram) == 10
    assert facts.column("when").declare == "date"
    assert facts.labels[0] == "outcome"
    assert facts.clients == ("hospital",)


def test_one_word_in_a_column_of_numbers_is_named_by_its_line(tmp_path):
    lines = ["age", *map(str, range(60, 20, -1)), "old"]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    column = describe_file(tmp_path / "t.csv").column("age")
    assert column.type == "number"
    assert column.note == "1 of its cells are no numbers, such as 'old' in line 42"


def test_other_delimiters_decimals_and_files_are_found(tmp_path):
    (tmp_path / "t.csv").write_text("a;b\n1,5;x\n2,5;y\n3,5;y\n")
    facts = describe_file(tmp_path / "t.csv")
    assert (facts.delimiter, facts.decimal) == (";", ",")
    assert facts.column("a").numbers == (1.5, 2.5, 3.5)
    columns = {
        "x": np.array([1.0, np.nan, 3.0]),
        "image": pa.array([{"bytes": b"", "path": "p"}] * 3),
        "signal": pa.array([[1.0, 2.0]] * 3),
        "ok": [True, False, None],
    }
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    found = {c.name: (c.type, c.missing) for c in describe_file(tmp_path / "t.parquet").columns}
    assert found == {
        "x": ("number", 1),
        "image": ("image", 0),
        "signal": ("list", 0),
        "ok": ("word", 1),
    }


def test_the_command_shows_columns_candidates_and_what_to_do_next(table, shell):
    said = shell("data", "describe", table)
    assert said.code == 0
    assert "10 rows, 7 columns (csv)" in said.out
    assert "30 to 90, median 50" in said.out
    assert "cook 8, nurse 1" in said.out
    assert "candidates for label: outcome" in said.out
    assert f"next: fedpress init --data {table}" in " ".join(said.out.split("\n"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tt.csv", "no such path .*did you mean 't.csv'"),
        ("t.txt", "is no table; give a file .csv, .parquet"),
    ],
)
def test_what_is_no_table_is_told(table, name, said):
    with pytest.raises(DataError, match=said):
        describe_file(table.parent / name)


def test_bars_grow_with_counts():
    assert bars([]) == ""
    assert bars([0, 0]) == "  "
    assert bars([1, 1000]) == "▁█"


def test_codes_and_dates_of_other_forms_are_found_and_say_their_types(tmp_path):
    days = [f"{at % 28 + 1:02}.03.2024" for at in range(300)]
    lines = [f"0{at % 3}7,{day},{at % 24}:30,{at}x" for at, day in enumerate(days)]
    (tmp_path / "t.csv").write_text("\n".join(["zip,day,time,free", *lines]))
    found = {one.name: (one.type, one.declare) for one in describe_file(tmp_path / "t.csv").columns}
    assert found == {
        "zip": ("integer id", "integer id"),
        "day": ("date", "date %d.%m.%Y"),
        "time": ("text", ""),
        "free": ("text", ""),
    }
    assert describe_file(tmp_path / "t.csv").column("zip").words[0] == ("007", 100)
    assert describe_file(tmp_path / "t.csv").column("time").note == "it holds times of day"


@pytest.mark.parametrize(
    "written",
    ["2024-05-01T{:02}:00:00+02:00", "2024-05-01T{:02}:00:00.500", "2024-05-01 {:02}:00"],
)
def test_times_of_iso_8601_are_dates(tmp_path, written):
    hours = [hour for hour in range(20) if hour != 7]
    lines = ["when;riders", *(f"{written.format(hour)};{hour}" for hour in hours)]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    when = describe_file(tmp_path / "t.csv").column("when")
    assert (when.type, when.declare) == ("date", "date")


def test_the_first_and_the_last_time_are_shown_as_times(tmp_path):
    (tmp_path / "t.csv").write_text("when;riders\n2024-05-01 06:30;1\n2024-05-02 07:00;2\n")
    when = describe_file(tmp_path / "t.csv").column("when")
    assert when.dates == ("2024-05-01 06:30:00", "2024-05-02 07:00:00")


def test_a_german_export_is_read_as_its_owner_does(tmp_path):
    lines = ["Kundennr.;Antragsdatum;Betrag €"]
    for at in range(40):
        lines.append(f"{100_000 + at * 7 // 4};{at % 28 + 1:02}.07.2019;1.{at:03},50")
    (tmp_path / "t.csv").write_text("\n".join(lines), "cp1252")
    facts = describe_file(tmp_path / "t.csv")
    assert (facts.encoding, facts.delimiter, facts.decimal) == ("cp1252", ";", ",")
    # A customer has several rows.
    assert [one.type for one in facts.columns] == ["integer id", "date", "number"]
    assert facts.column("Antragsdatum").declare == "date %d.%m.%Y"
    assert facts.column("Betrag €").numbers[0] == 1000.5


def test_a_named_count_of_few_values_is_no_id(tmp_path):
    (tmp_path / "t.csv").write_text("ward_no\n" + "1\n2\n3\n" * 10)
    assert describe_file(tmp_path / "t.csv").column("ward_no").type == "number"
