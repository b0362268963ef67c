"""A table that is read in batches gives the numbers of the same table in memory."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch

from fedpress.data import batches, scattered, streamed
from fedpress.data.load import load
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

WRITERS = {
    "csv": lambda table, path: pyarrow.csv.write_csv(table, path),
    "parquet": lambda table, path: pyarrow.parquet.write_table(table, path, row_group_size=50),
    "arrow": lambda table, path: pyarrow.feather.write_feather(table, path, chunksize=60),
}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(batches, "CELLS", 7 * 20)
    monkeypatch.setenv("FEDPRESS_CACHE", str(tmp_path / "cache"))


def table(rows: int = 200, *, gaps: bool = False, seed: int = 0) -> pa.Table:
    chance = np.random.default_rng(seed)
    age = chance.normal(50, 10, rows)
    job = chance.choice(["cook", "nurse", "pilot"], rows).tolist()
    if gaps:
        age[::9] = np.nan
        job[4::17] = [None] * len(job[4::17])
    return pa.table(
        {
            "age": pa.array(age, from_pandas=True),
            "job": job,
            "smokes": chance.random(rows) > 0.5,
            "clinic": chance.choice(["open", "north", "south"], rows),
            "outcome": chance.choice(["ill", "well"], rows),
        }
    )


def settings(source, path, **keys) -> DataSettings:
    same = {"client_column": "clinic", "label_column": "outcome", "public_clients": ["open"]}
    return DataSettings(source=source, path=path, **(same | keys))


def mapped(folder) -> list[str]:
    """Returns the files in a folder that this process has mapped, as the system lists them."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


def same(one, other) -> None:
    assert list(one.clients) == list(other.clients)
    parts = [(one.clients[name], other.clients[name]) for name in one.clients]
    parts += [
        (getattr(one, name), getattr(other, name)) for name in ("public", "validation", "test")
    ]
    for here, there in parts:
        assert torch.equal(here.x, there.x)
        assert torch.equal(here.y, there.y)
    assert (one.preprocess, one.preparation) == (other.preprocess, other.preparation)
    assert (one.left_out, one.class_names) == (other.left_out, other.class_names)


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("missing", ["error", "mean", "drop"])
def test_batches_give_the_same_numbers_as_memory(tmp_path, source, missing):
    path = tmp_path / f"visits.{source}"
    WRITERS[source](table(gaps=missing != "error"), path)
    asked = settings(source, path, missing=missing)
    same(
        load(asked.model_copy(update={"stream": True}), 3),
        load(asked.model_copy(update={"stream": False}), 3),
    )


@pytest.mark.parametrize("source", WRITERS)
def test_declared_types_and_dates_are_read_alike(tmp_path, source):
    path = tmp_path / f"visits.{source}"
    days = np.datetime64("2024-05-01") + np.arange(200) % 50
    rows = table().append_column("since", pa.array(days))
    WRITERS[source](rows.append_column("ward", pa.array(np.arange(200) % 3)), path)
    asked = settings(source, path, types={"since": "date", "ward": "word"})
    same(
        load(asked.model_copy(update={"stream": True}), 0),
        load(asked.model_copy(update={"stream": False}), 0),
    )


@pytest.mark.parametrize("unknown", [None, "drop", "other"])
def test_words_that_only_clients_have_are_treated_alike(tmp_path, unknown):
    path = tmp_path / "visits.csv"
    rows = table()
    jobs = pa.array(
        ["judge" if at % 7 == 0 else job for at, job in enumerate(rows["job"].to_pylist())]
    )
    is_open = np.array(rows["clinic"].to_pylist()) == "open"
    jobs = pa.array(np.where(is_open, "cook", np.array(jobs.to_pylist())))
    WRITERS["csv"](rows.set_column(1, "job", jobs), path)
    asked = settings("csv", path, unknown=unknown)
    same(
        load(asked.model_copy(update={"stream": True}), 0),
        load(asked.model_copy(update={"stream": False}), 0),
    )


def test_each_of_several_files_may_be_a_client(tmp_path):
    for at, name in enumerate(["open", "north", "south"]):
        WRITERS["parquet"](table(90, seed=at).drop_columns("clinic"), tmp_path / f"{name}.parquet")
    asked = settings("parquet", tmp_path / "*.parquet", client_column="file")
    same(
        load(asked.model_copy(update={"stream": True}), 0),
        load(asked.model_copy(update={"stream": False}), 0),
    )


def test_dealt_rows_and_shares_are_the_same(tmp_path):
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(), path)
    keys = {
        "client_column": None,
        "drop_columns": ["clinic"],
        "public_clients": [],
        "public_share": 0.2,
        "num_clients": 4,
    }
    asked = settings("parquet", path, **keys, partition={"kind": "dirichlet", "alpha": 0.5})
    same(
        load(asked.model_copy(update={"stream": True}), 1),
        load(asked.model_copy(update={"stream": False}), 1),
    )


def test_inputs_lie_in_a_file_without_a_name(tmp_path):
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(), path)
    data = load(settings("parquet", path, stream=True), 0)
    assert any("(deleted)" in line for line in mapped(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []
    held = next(iter(data.clients.values())).x
    assert held.untyped_storage().data_ptr() == data.public.x.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            {"age": [50.0] * 149 + [None] + [50.0] * 50},
            {},
            "rows 121 to 160: feature column 'age': 1 of 40 rows have no value (first: row 150); "
            "set missing = 'drop' or 'mean', or name it in drop_columns",
        ),
        (
            {"age": [[1.0, 2.0]] * 200},
            {},
            "feature column 'age': holds list<element: double>, and a table that is read in batches "
            "has numbers, words and dates; set stream = false, if the table fits into memory",
        ),
        ({}, {"label_column": "outcom"}, "did you mean 'outcome'?"),
    ],
)
def test_a_wrong_table_is_refused_by_rows_and_column(tmp_path, change, keys, message):
    rows = table()
    for name, values in change.items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    path = tmp_path / "visits.parquet"
    pyarrow.parquet.write_table(rows, path)
    with pytest.raises(DataError) as caught:
        load(settings("parquet", path, stream=True, **keys), 0)
    assert message in str(caught.value)


def test_a_file_that_lacks_a_column_is_named(tmp_path):
    WRITERS["parquet"](table(), tmp_path / "a.parquet")
    WRITERS["parquet"](table().drop_columns("job"), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet': not like the other files \(.*job"):
        load(settings("parquet", tmp_path, stream=True), 0)


def test_a_line_that_was_cut_short_is_refused_without_its_text(tmp_path):
    path = tmp_path / "visits.csv"
    WRITERS["csv"](table(), path)
    path.write_text(path.read_text() + "51.5,secr")
    with pytest.raises(DataError) as caught:
        load(settings("csv", path, stream=True), 0)
    assert "visits.csv': not a readable csv file" in str(caught.value)
    assert "xpected 5 columns, got 2); correct it, or copy it again" in str(caught.value)
    assert "secr" not in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "visits.csv"
    WRITERS["csv"](table(), path)
    encoded = streamed.StreamedColumns.rows_at

    def changing(self, rows):
        found = encoded(self, rows)
        path.write_text(path.read_text() + path.read_text().splitlines()[-1])
        return found

    monkeypatch.setattr(streamed.StreamedColumns, "rows_at", changing)
    with pytest.raises(DataError, match=r"visits.csv': it has changed while it was read; start"):
        load(settings("csv", path, stream=True), 0)


def test_means_of_public_rows_in_any_order_have_the_same_bits(tmp_path):
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(3000, gaps=True), path)
    asked = settings("parquet", path, missing="mean", validation=0.2)
    same(
        load(asked.model_copy(update={"stream": True}), 3),
        load(asked.model_copy(update={"stream": False}), 3),
    )


def test_a_public_list_has_a_word_that_only_the_last_batch_has(tmp_path):
    path = tmp_path / "visits.parquet"
    rows = table()
    jobs = pa.array([*rows["job"].to_pylist()[:-1], "judge"])
    clinics = pa.array([*rows["clinic"].to_pylist()[:-1], "north"])
    rows = rows.set_column(1, "job", jobs).set_column(3, "clinic", clinics)
    WRITERS["parquet"](rows, path)
    asked = settings("parquet", path, public_words=["job"])
    streamed_data = load(asked.model_copy(update={"stream": True}), 0)
    same(streamed_data, load(asked.model_copy(update={"stream": False}), 0))
    assert "judge" in streamed_data.preparation.columns[1].words


def test_files_may_have_whole_numbers_and_decimals(tmp_path):
    for at, name in enumerate(["a", "b"]):
        rows = table(90, seed=at)
        ages = rows["age"].combine_chunks().cast(pa.int64() if at else pa.float64(), safe=False)
        WRITERS["parquet"](rows.set_column(0, "age", ages), tmp_path / f"{name}.parquet")
    asked = settings("parquet", tmp_path / "*.parquet")
    same(
        load(asked.model_copy(update={"stream": True}), 0),
        load(asked.model_copy(update={"stream": False}), 0),
    )


def test_a_file_and_a_batch_may_have_no_value_of_a_column(tmp_path):
    for at, name in enumerate(["a", "b", "c"]):
        rows = table(90, seed=at)
        ages = [rows["age"], pa.nulls(90), pa.array([None] * 60 + [1.5] * 30)][at]
        WRITERS["parquet"](rows.set_column(0, "age", ages), tmp_path / f"{name}.parquet")
    asked = settings("parquet", tmp_path / "*.parquet", missing="mean")
    same(
        load(asked.model_copy(update={"stream": True}), 0),
        load(asked.model_copy(update={"stream": False}), 0),
    )


def test_a_disk_that_fills_while_rows_are_converted_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scattered.os, "pwrite", full)
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(), path)
    with pytest.raises(DataError, match=r"no room for 0.0 GB .*; make room there, or name another"):
        load(settings("parquet", path, stream=True), 0)
    assert os.listdir(tmp_path / "cache") == []


def test_a_source_without_batches_says_so(tmp_path):
    asked = DataSettings(source="sql", path=tmp_path / "x.db", table="t", stream=True)
    with pytest.raises(
        DataError, match=r"stream: source 'sql' is not read in batches; leave stream"
    ):
        load(asked, 0)


def test_no_room_on_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streamed.os, "posix_fallocate", full)
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(), path)
    with pytest.raises(
        DataError, match=r"no room for 0.0 GB of inputs \(No space left on device\)"
    ):
        load(settings("parquet", path, stream=True), 0)


def test_a_table_is_streamed_of_itself_when_it_is_large(tmp_path, monkeypatch):
    path = tmp_path / "visits.parquet"
    WRITERS["parquet"](table(), path)
    monkeypatch.setattr(streamed, "SHARE_OF_MEMORY", 1e-12)
    data = load(settings("parquet", path), 0)
    assert mapped(tmp_path / "cache"), data
