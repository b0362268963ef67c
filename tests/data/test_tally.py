"""A table that is read in batches is described as the same table in memory."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from fedpress.data import batches, describe, streamed, tally
from fedpress.data.batches import TableFiles
from fedpress.data.columns import Column
from fedpress.data.describe import describe_file
from fedpress.data.describe_column import describe_column
from fedpress.data.load import load
from fedpress.data.settings import DataSettings
from fedpress.data.tally import describe_batches

WRITERS = {"csv": pyarrow.csv.write_csv, "parquet": pyarrow.parquet.write_table}


def table(rows: int = 500) -> pa.Table:
    chance = np.random.default_rng(0)
    age = chance.normal(50, 10, rows).round(1)
    age[::9] = np.nan
    days = np.datetime64("2024-05-01") + chance.integers(0, 300, rows)
    codes = [f"0{at % 7}7" if at > rows - 20 else str(100 + at % 800) for at in range(rows)]
    words = chance.choice(["cook", "nurse", "pilot"], rows).tolist()
    words[-1] = "judge"
    return pa.table(
        {
            "id": np.arange(rows),
            "age": pa.array(age, from_pandas=True),
            "weight": chance.normal(70, 10, rows),
            "job": [None if at % 17 == 4 else word for at, word in enumerate(words)],
            "zip": codes,
            "smokes": chance.random(rows) > 0.5,
            "since": days,
            "day": [str(day)[8:] + "." + str(day)[5:7] + "." + str(day)[:4] for day in days],
            "free": [f"{at}x" for at in range(rows)],
            "times": [f"{at % 24}:30" for at in range(rows)],
            "empty": pa.array([None] * rows, pa.string()),
            "stray": [*map(str, range(rows - 1)), "old"],
            "image": pa.array([{"bytes": b"", "path": "p"}] * rows),
            "signal": pa.array([[1.0, 2.0]] * rows),
        }
    )


def settings(source, path) -> DataSettings:
    return DataSettings(source=source, path=path)


def written(tmp_path, source, content):
    if source == "csv":
        content = content.drop_columns(["image", "signal"])
    WRITERS[source](content, tmp_path / f"t.{source}")
    return TableFiles([tmp_path / f"t.{source}"], settings(source, tmp_path / f"t.{source}"))


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("kept", [7, 100, 4096])
def test_batches_are_described_as_the_whole(tmp_path, monkeypatch, source, kept):
    monkeypatch.setattr(batches, "CELLS", 14 * 40)
    monkeypatch.setattr(tally, "KEPT", kept)
    files = written(tmp_path, source, table())
    whole = pa.concat_tables(files.batches(files.columns.column_names))
    plain = files.settings.model_copy(update={"path": None})
    for found in describe_batches(files, whole.column_names, files.settings):
        assert found == describe_column(Column.of(whole, found.name, plain), plain)


def test_a_sample_keeps_what_decides_and_estimates_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CELLS", 1000)
    monkeypatch.setattr(tally, "KEPT", 150)
    monkeypatch.setattr(tally, "SAMPLE", 500)
    # Blocks of text, since a CSV file is read in blocks of a megabyte.
    content = table(20_000)
    files = written(tmp_path, "csv", content)
    facts = {
        one.name: one for one in describe_batches(files, content.column_names[:12], files.settings)
    }
    exact = {
        name: describe_column(Column.of(table_of(files), name, files.settings), files.settings)
        for name in facts
    }
    for name, found in facts.items():
        same = ("type", "missing", "words", "dates", "declare", "rows")
        assert [getattr(found, key) for key in same] == [getattr(exact[name], key) for key in same]
        # The estimate does not see values that are rare.
        assert 0.5 < found.distinct / max(exact[name].distinct, 1) < 1.3 or not found.sampled
        assert sum(found.histogram) == pytest.approx(sum(exact[name].histogram), rel=0.01)
    assert facts["stray"].note == "1 of its cells are no numbers, such as 'old' in row 20000"
    assert facts["weight"].numbers[::2] == exact["weight"].numbers[::2]
    assert facts["weight"].numbers[1] == pytest.approx(exact["weight"].numbers[1], abs=1)
    assert facts["weight"].sampled
    assert not facts["job"].sampled


def table_of(files) -> pa.Table:
    return pa.concat_tables(files.batches(files.columns.column_names))


def test_a_batch_without_any_value_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CELLS", 20)
    age = [None] * 30 + [str(at) for at in range(40)] + [None] * 30
    files = written(tmp_path, "parquet", pa.table({"age": pa.array(age, pa.string())}))
    found = describe_batches(files, ["age"], files.settings)[0]
    assert (found.missing, found.rows, found.distinct) == (60, 100, 40)


@pytest.mark.parametrize("whose", ["all", "public"])
def test_check_describes_a_streamed_table_as_one_in_memory(tmp_path, whose):
    content = (
        table()
        .select(["age", "job", "smokes"])
        .append_column("clinic", pa.array(["open", "north", "south", "west", "east"] * 100))
    )
    pyarrow.parquet.write_table(content, tmp_path / "t.parquet", row_group_size=50)
    asked = DataSettings(
        source="parquet",
        path=tmp_path / "t.parquet",
        client_column="clinic",
        label_column="smokes",
        public_clients=["open"],
        missing="drop",
    )
    one, other = (
        load(asked.model_copy(update={"stream": stream}), 0, describe=whose).columns
        for stream in (True, False)
    )
    assert one == other
    assert {found.name for found in one} == {"age", "job", "smokes"}


def test_a_large_file_is_described_without_being_loaded(tmp_path, monkeypatch):
    written(tmp_path, "parquet", table())
    exact = describe_file(tmp_path / "t.parquet")
    monkeypatch.setattr(streamed, "SHARE_OF_MEMORY", 1e-12)
    monkeypatch.setattr(describe.tables, "READERS_OF_FILES", {})
    assert describe_file(tmp_path / "t.parquet") == exact


def test_a_decimal_comma_of_a_large_file_is_found(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("a;b\n1,5;x\n2,5;y\n3,5;y\n")
    exact = describe_file(tmp_path / "t.csv")
    monkeypatch.setattr(streamed, "SHARE_OF_MEMORY", 1e-12)
    assert describe_file(tmp_path / "t.csv") == replace(exact, decimal=",")
