import sqlite3
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from fedpress.data import DataSettings, load, sql
from fedpress.errors import DataError

ROWS = 40


@pytest.fixture
def database(tmp_path):
    """An SQLite file with the table `visits` of two hospitals."""
    chance = np.random.default_rng(0)
    path = tmp_path / "visits.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            'CREATE TABLE visits (hospital TEXT, age INTEGER, dose REAL, "the ward" TEXT, label TEXT)'
        )
        rows = [
            (
                ["north", "south"][at % 2],
                int(chance.integers(20, 80)),
                float(chance.normal()),
                "abbc"[at % 4],
                ["no", "yes", "yes", "no"][at % 4],
            )
            for at in range(ROWS)
        ]
        connection.executemany("INSERT INTO visits VALUES (?, ?, ?, ?, ?)", rows)
    return path


def ask(path=None, **keys):
    wanted = {"client_column": "hospital", "public_share": 0.3, "validation": 2, "path": path}
    if not {"table", "query"} & {*keys}:
        wanted["table"] = "visits"
    return DataSettings(source="sql", **wanted, **keys)


def run(path, *commands):
    with closing(sqlite3.connect(path)) as connection, connection:
        for command in commands:
            connection.execute(command)


def as_parquet(path):
    with closing(sqlite3.connect(path)) as connection:
        cursor = connection.execute("SELECT * FROM visits")
        names = [column[0] for column in cursor.description]
        columns = zip(*cursor, strict=True)
    made = path.with_suffix(".parquet")
    pq.write_table(pa.table(dict(zip(names, map(list, columns), strict=True))), made)
    return made


def equal(one, two):
    assert list(one.clients) == list(two.clients)
    for name, client in one.clients.items():
        assert torch.equal(client.x, two.clients[name].x)
        assert torch.equal(client.y, two.clients[name].y)
    assert one.preparation == two.preparation


def ways(path):
    """The same table: by a path, by addresses of the standard library and of SQLAlchemy."""
    return [
        ask(path),
        ask(address=f"sqlite:///{path}"),
        ask(path, query="SELECT * FROM visits"),
        ask(address=f"sqlite+pysqlite:///{path}"),
        ask(address=f"sqlite+pysqlite:///{path}", query="SELECT * FROM visits"),
    ]


@pytest.mark.parametrize("way", range(5))
def test_a_table_of_a_database_gives_the_rows_of_parquet(database, way, monkeypatch):
    """Rows that are fetched in several batches are the same rows."""
    if way > 2:
        pytest.importorskip("sqlalchemy")
    monkeypatch.setattr(sql, "BATCH", 7)
    wanted = load(
        DataSettings(
            source="parquet",
            path=as_parquet(database),
            client_column="hospital",
            public_share=0.3,
            validation=2,
        ),
        0,
    )
    equal(load(ways(database)[way], 0), wanted)


def test_a_query_chooses_rows_and_columns(database):
    query = "SELECT hospital, age * 2 AS twice, label FROM visits WHERE age > 30 AND label <> ':x'"
    data = load(ask(database, query=query), 0)
    assert data.preparation.columns[0].name == "twice"
    assert data.example_shape == (1,)


def test_a_colon_in_a_query_is_no_parameter(database):
    pytest.importorskip("sqlalchemy")
    query = "SELECT *, '12:30' AS time FROM visits"
    data = load(ask(address=f"sqlite+pysqlite:///{database}", query=query), 0)
    assert data.preparation.columns[-1].words == ("12:30",)


def test_an_address_may_name_environment_variables(database, monkeypatch):
    monkeypatch.setenv("VISITS", str(database))
    assert load(ask(address="sqlite:///$VISITS"), 0).name == "visits"


def test_missing_cells_are_missing_as_in_other_tables(database):
    run(database, "UPDATE visits SET age = NULL WHERE rowid = 3")
    with pytest.raises(DataError, match=r"feature column 'age': 1 of 40 rows have no value"):
        load(ask(database), 0)
    data = load(ask(database, missing="drop"), 0)
    parts = (data.public, data.validation, data.test, *data.clients.values())
    assert sum(map(len, parts)) == ROWS - 1


def test_nothing_is_written(database):
    before = database.read_bytes()
    with pytest.raises(DataError, match=r"query: the database refuses it .*readonly"):
        load(ask(database, query="DELETE FROM visits"), 0)
    assert database.read_bytes() == before
    missing = database.with_name("no.db")
    with pytest.raises(DataError, match=r"source 'sql': no database '.*no.db'; check the path"):
        load(ask(missing), 0)
    assert not missing.exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"table": "visit"}, "table: no table 'visit' in .*it has visits.; did you mean 'visits'"),
        ({"query": "SELEC 1"}, 'query: the database refuses it .near "SELEC": syntax error'),
        ({"query": "SELECT nose FROM visits"}, "query: the database refuses it .no such column"),
        ({"query": "SELECT * FROM visits WHERE age > 999"}, "query: it returned no rows"),
        ({"query": "SELECT age, age FROM visits"}, "two columns are named 'age'"),
        ({"label_column": "ill"}, "label_column: no column 'ill' in '.*visits.db'"),
    ],
)
@pytest.mark.parametrize("library", ["standard", "sqlalchemy"])
def test_a_wrong_query_is_refused_with_its_key(database, keys, message, library):
    where = {"path": database}
    if library == "sqlalchemy":
        pytest.importorskip("sqlalchemy")
        where = {"address": f"sqlite+pysqlite:///{database}"}
    with pytest.raises(DataError, match=message):
        load(ask(**where, **keys), 0)


@pytest.mark.parametrize("batch", [100, 10])
def test_text_among_numbers_is_refused_without_the_text(database, batch, monkeypatch):
    monkeypatch.setattr(sql, "BATCH", batch)
    run(database, "UPDATE visits SET age = 'secret' WHERE rowid > 20")
    with pytest.raises(DataError, match=r"visits.db' column 'age': .*write CAST") as caught:
        load(ask(database), 0)
    assert "secret" not in str(caught.value)
    if batch == 100:
        assert "row 20 holds text, but the rows before hold numbers" in str(caught.value)


def test_integers_beside_decimals_are_numbers(database):
    run(database, "UPDATE visits SET dose = 3 WHERE rowid > 20", "UPDATE visits SET age = 2.5")
    assert load(ask(database), 0).example_shape == (5,)


def test_bytes_are_refused_as_a_feature(database):
    run(database, "ALTER TABLE visits ADD photo BLOB", "UPDATE visits SET photo = x'00ff'")
    with pytest.raises(DataError, match="feature column 'photo': holds binary; expected numbers"):
        load(ask(database), 0)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "a.db").write_text("age,label\n1,2\n" * 100)
    with pytest.raises(DataError, match=r"a.db': not a readable SQLite file"):
        load(ask(tmp_path / "a.db"), 0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nodb://host/name", "address: SQLAlchemy knows no database 'nodb'"),
        ("nonsense", "address: SQLAlchemy knows no database"),
        ("sqlite+pysqlite:////no/such/folder/a.db", "the database does not answer"),
        ("postgresql+psycopg://me:$WORD@localhost/x", "driver of this database is not installed"),
    ],
)
def test_a_wrong_address_is_refused(address, message):
    pytest.importorskip("sqlalchemy")
    with pytest.raises(DataError, match=message):
        load(ask(address=address), 0)


def test_without_sqlalchemy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sqlalchemy", None)
    with pytest.raises(DataError, match=r"address: only .*; pip install 'fedpress\[sql\]'"):
        load(ask(address="postgresql://host/x"), 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"table": "t"}, "a database needs either path or address"),
        ({"path": "a.db", "address": "sqlite:///a.db", "table": "t"}, "either path or address"),
        ({"path": "a.db"}, "a database needs either query or table"),
        ({"path": "a.db", "query": "SELECT 1", "table": "t"}, "either query or table"),
        ({"address": "postgresql://me:secret@host/x", "table": "t"}, "it holds a password"),
    ],
)
def test_keys_of_a_database_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(source="sql", **keys)


def test_keys_of_a_database_are_refused_for_other_sources():
    with pytest.raises(ValidationError, match="source 'csv' is no database"):
        DataSettings(source="csv", path="a.csv", query="SELECT 1")


def test_a_relative_address_counts_from_the_recipe(database):
    from fedpress.api import begin

    text = (
        'name = "x"\n[data]\nsource = "sql"\naddress = "sqlite:///visits.db"\ntable = "visits"\n'
        '[model]\narchitecture = "mlp"\narguments = { in_features = 5 }\n'
        '[[stage]]\nkind = "federate"\n'
    )
    recipe = database.with_name("visits.toml")
    recipe.write_text(text)
    found = begin.load(recipe, ())[1].data
    assert found.address == f"sqlite:///{database.resolve()}"
