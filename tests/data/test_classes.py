"""No private row decides which classes, words and inputs there are, whatever the source."""

import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import DataSettings, FederatedData, load
from fedpress.errors import DataError

SECRET = "rare-disease"
SITES = ("open", "north", "south")


def rows(secret: bool) -> list[dict[str, object]]:
    """60 rows of three sites; with `secret`, one private row more that has what no public row has."""
    table: list[dict[str, object]] = []
    for i in range(60):
        table.append(
            {
                "site": SITES[i % 3],
                "age": 30 + i,
                "job": ["cook", "nurse"][i % 2],
                "diag": ["ill", "well"][i % 2],
            }
        )
    if secret:
        table.append({"site": "north", "age": 44, "job": "spy", "diag": SECRET})
    return table


def write_csv(folder, secret):
    lines = [",".join(map(str, row.values())) for row in rows(secret)]
    (folder / "t.csv").write_text("\n".join(["site,age,job,diag", *lines]))
    return {
        "source": "csv",
        "path": folder / "t.csv",
        "client_column": "site",
        "label_column": "diag",
    }


def write_parquet(folder, secret):
    pq.write_table(pa.Table.from_pylist(rows(secret)), folder / "t.parquet")
    return {
        "source": "parquet",
        "path": folder / "t.parquet",
        "client_column": "site",
        "label_column": "diag",
    }


def write_folders(folder, secret):
    for i, row in enumerate(rows(secret)):
        place = folder / "images" / str(row["site"]) / str(row["diag"])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(place / f"{i:03}.png")
    return {"source": "folders", "path": folder / "images"}


def function(folder, secret, labels=lambda row: row["diag"]):
    module = types.ModuleType("own_rows")
    module.make = lambda: {
        site: ([[row["age"]] for row in rows(secret) if row["site"] == site],
               [labels(row) for row in rows(secret) if row["site"] == site])
        for site in SITES
    }  # fmt: skip
    sys.modules["own_rows"] = module
    return {"source": "own_rows:make"}


def numbered_function(folder, secret):
    return function(folder, secret, lambda row: {"ill": 0, "well": 1, SECRET: 9}[row["diag"]])


SOURCES = [write_csv, write_parquet, write_folders, function, numbered_function]


def read(keys, **more) -> FederatedData:
    keys = {"public_clients": ["open"], "validation": 0.1, "test_share": 0.2, **keys, **more}
    return load(DataSettings(**keys), 0)


@pytest.mark.parametrize("source", SOURCES)
def test_a_private_row_changes_neither_classes_nor_shape_nor_other_rows(tmp_path, source):
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    one, two = read(source(tmp_path / "with", True)), read(source(tmp_path / "without", False))
    assert one.class_names == two.class_names
    assert one.example_shape == two.example_shape
    assert one.preprocess == two.preprocess
    assert torch.equal(one.public.x, two.public.x)
    assert sum(one.left_out.values()) == 1
    assert sum(two.left_out.values()) == 0
    assert SECRET not in repr(one.describe())


@pytest.mark.parametrize("source", SOURCES)
def test_unknown_rows_become_other_where_the_recipe_says_so(tmp_path, source):
    keys = source(tmp_path, True)
    data, without = read(keys, unknown="other"), read(keys)
    assert data.class_names == (*without.class_names, "other")
    held = torch.cat([part.y for part in (*data.clients.values(), data.test)])
    assert int((held == 2).sum()) == 1
    assert sum(data.left_out.values()) == 0


@pytest.mark.parametrize("source", SOURCES)
def test_without_public_rows_the_error_names_lines_that_help_and_no_label(tmp_path, source):
    keys = source(tmp_path, True) | {"public_clients": [], "validation": 0}
    with pytest.raises(DataError, match="no row is public") as caught:
        read(keys)
    assert SECRET not in str(caught.value)
    assert "classes = [" in str(caught.value)
    label = keys.get("label_column", "label")
    assert f'public_words = ["{label}"]' in str(caught.value)
    shared = read(keys, public_share=0.3)
    drawn = {shared.class_names[label] for label in shared.public.y.tolist()}
    assert {"ill", "well"} <= drawn == set(shared.class_names) or drawn == {"0", "1"}
    words = {"words": {"job": ["cook", "nurse"]}} if "label_column" in keys else {}
    data = read(keys, classes=["well", "ill"], **words)
    assert data.class_names == ("well", "ill")
    assert sum(data.left_out.values()) == 1
    every = [label, *(["job"] if "label_column" in keys else [])]
    assert len(read(keys, public_words=every).class_names) == (
        10 if source is numbered_function else 3
    )


@pytest.mark.parametrize("source", [write_csv, write_parquet])
def test_words_come_from_public_rows_or_the_recipe(tmp_path, source):
    keys = source(tmp_path, True) | {"public_words": ["diag"]}
    assert read(keys).example_shape == (3,)
    assert read(keys | {"public_words": ["diag", "job"]}).example_shape == (4,)
    assert read(keys, words={"job": ["spy", "cook", "nurse"]}).example_shape == (4,)
    assert read(keys, unknown="other").example_shape == (4,)
    assert (
        read(keys, unknown="drop").left_out["clients"] + read(keys, unknown="drop").left_out["test"]
        == 1
    )
    nobody = keys | {"public_clients": [], "validation": 0}
    with pytest.raises(
        DataError,
        match=r"feature column 'job': it holds words, but there is no public row .* words = \{",
    ) as got:
        read(nobody)
    assert "spy" not in str(got.value)


def test_without_public_rows_private_rows_do_not_decide_what_a_column_holds(tmp_path):
    lines = [f"{SITES[i % 3]},{30 + i},{('true', 'false')[i % 2]},{i % 2}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["site,age,member,diag", *lines]))
    keys = {
        "source": "csv",
        "path": tmp_path / "t.csv",
        "client_column": "site",
        "label_column": "diag",
        "public_clients": [],
        "validation": 0,
        "classes": ["0", "1"],
    }
    with pytest.raises(DataError, match=r"'member': it holds words, but there is no public row"):
        read(keys)
    # The declared columns, and columns of numbers, need no public rows.
    assert read(keys, public_words=["member"]).example_shape == (2,)
    assert read(keys, drop_columns=["member"]).example_shape == (1,)


@pytest.mark.parametrize("odd", ["age", "diag"])
def test_a_private_word_among_numbers_changes_no_column(tmp_path, odd):
    lines = [f"{SITES[i % 3]},{30 + i},{(2, 10)[i % 2]}" for i in range(60)]
    row = {"age": f"north,{SECRET},2", "diag": f"north,44,{SECRET}"}[odd]
    (tmp_path / "t.csv").write_text("\n".join(["site,age,diag", *lines, row]))
    keys = {
        "source": "csv",
        "path": tmp_path / "t.csv",
        "client_column": "site",
        "label_column": "diag",
    }
    if odd == "age":
        with pytest.raises(DataError, match="some rows have other text") as caught:
            read(keys)
        assert SECRET not in str(caught.value)
    data = read(keys, missing="drop")
    assert (data.class_names, data.example_shape) == (("2", "10"), (1,))
    assert sum(data.left_out.values()) == 1


def test_classes_are_found_whatever_kind_the_file_gives_them(tmp_path):
    for values, classes in (
        (("0", "1"), [1, 0]),
        (("true", "false"), ["False", "True"]),
        (("1.0", "2.0"), [2, 1]),
    ):
        lines = [f"{SITES[i % 3]},{i},{values[i % 2]}" for i in range(60)]
        (tmp_path / "t.csv").write_text("\n".join(["site,age,diag", *lines]))
        keys = {
            "source": "csv",
            "path": tmp_path / "t.csv",
            "client_column": "site",
            "label_column": "diag",
        }
        assert read(keys, classes=classes).left_out == {
            "public": 0,
            "validation": 0,
            "test": 0,
            "clients": 0,
        }
    with pytest.raises(
        DataError,
        match=r"^classes: no row .* is one of a, b; write them as they are in the data",
    ):
        read(keys, classes=["a", "b"])


def test_a_client_of_unknown_classes_alone_is_refused_without_naming_them(tmp_path):
    keys = write_csv(tmp_path, True)
    text = (tmp_path / "t.csv").read_text() + f"\nwest,50,cook,{SECRET}"
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="client 'west': all its rows are dropped") as caught:
        read(keys)
    assert SECRET not in str(caught.value)
    assert "west" in read(keys, unknown="other").clients


def test_one_class_is_refused_in_every_source(tmp_path):
    for site in SITES:
        (tmp_path / "images" / site / "cat").mkdir(parents=True)
        for i in range(10):
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(
                tmp_path / "images" / site / "cat" / f"{i}.png"
            )
    with pytest.raises(DataError, match="all public rows have the same class, 'cat'"):
        read({"source": "folders", "path": tmp_path / "images"})
    with pytest.raises(DataError, match="all public rows have the same class, '0'"):
        read(function(tmp_path, False, lambda row: 0))
    with pytest.raises(ValueError, match="a classification needs at least two classes"):
        DataSettings(source="digits", classes=["a"])


def test_sources_with_classes_of_their_own_take_no_list():
    with pytest.raises(
        DataError, match=r"^classes: source 'digits' has classes of its own; leave classes out"
    ):
        load(DataSettings(source="digits", classes=["a", "b"]), 0)


def test_a_label_outside_the_classes_of_own_data_is_not_told():
    one = Arrays(torch.zeros(2, 3), torch.tensor([0, 7]))
    none = Arrays(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(
        DataError,
        match="client 'a': some labels are no class number; give class numbers from 0 to 1",
    ) as caught:
        FederatedData("mine", {"a": one}, none, none, none, 2, ("n", "y"), Preprocess())
    assert "7" not in str(caught.value)


def test_how_many_private_rows_are_left_out_is_told_only_where_nothing_is_promised(tmp_path):
    data = read(write_csv(tmp_path, True), test_share=0.0, test_clients=["south"])
    assert (
        data.left_out_sentence(private=False)
        == "rows of an unknown class or word are left out: 1 of the clients"
    )
    without = read(write_csv(tmp_path, False), test_share=0.0, test_clients=["south"])
    assert data.left_out_sentence(private=True) == without.left_out_sentence(private=True)
    assert without.left_out_sentence(private=False) == ""
