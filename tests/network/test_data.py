"""A client's own data: every form gives the arrays of the simulation, and every fault is named."""

import csv
import random

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fedpress.core.examples import Arrays
from fedpress.core.inputs import NamedInputs
from fedpress.errors import DataError
from fedpress.network.data import ClientData, check_layout, read_arrays, write_arrays
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.offer import Offer

TABLE = """
[data]
source = "csv"
path = "{path}"
client_column = "hospital"
label_column = "outcome"
public_clients = ["open"]
test_clients = ["test"]
validation = 0
[model]
architecture = "mlp"
arguments = {{ in_features = 5, num_classes = 2 }}
[[stage]]
kind = "federate"
num_rounds = 1
"""
IMAGES = """
[data]
source = "folders"
path = "{path}"
public_clients = ["open"]
test_clients = ["test"]
validation = 0
[model]
architecture = "cnn"
arguments = {{ in_channels = 3, image_size = 8, num_classes = 2 }}
[[stage]]
kind = "federate"
num_rounds = 1
"""
COLUMNS = ["hospital", "age", "pressure", "job", "outcome"]


def offer_of(text):
    """Returns the data of the simulation, and the offer that a server makes of the recipe."""
    recipe = recipes.load(text)
    data = load_data(recipe)
    state = first_state(recipe, data)
    preparation = data.preparation
    offer = Offer.of(
        recipe.stage[0],
        state.spec,
        state.model,
        preprocess=data.preprocess,
        task=data.task,
        seed=0,
        inputs=None if preparation is None else preparation.to_json(),
        labels=recipe.data.label_columns,
        reading=recipe.data.reading,
    )
    # As a client reads it.
    return data, Offer.from_message(offer.to_message({"stage": "federate"}))


def write_csv(path, rows, columns=COLUMNS):
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def visits(tmp_path):
    """Returns the rows of each hospital, the data of the simulation, and the offer."""
    drawn = random.Random(0)
    rows = {}
    for hospital in ("open", "test", "north", "south"):
        rows[hospital] = []
        for at in range(40):
            age = drawn.randint(20, 90)
            rows[hospital].append(
                {
                    "hospital": hospital,
                    "age": age,
                    "pressure": round(drawn.gauss(140, 10), 1),
                    "job": ["cook", "nurse", "pilot"][at % 3],
                    "outcome": "ill" if age > 55 else "healthy",
                }
            )
    path = write_csv(tmp_path / "all.csv", [row for part in rows.values() for row in part])
    data, offer = offer_of(TABLE.format(path=path))
    return rows, data, offer


def rows_of(arrays):
    """Returns the examples in an order of their own: the simulation shuffles them."""
    return sorted(zip(arrays.x.flatten(1).tolist(), arrays.y.tolist(), strict=True))


def equal(found, wanted):
    assert (found.x.dtype, found.x.shape) == (wanted.x.dtype, wanted.x.shape)
    assert found.y.dtype == wanted.y.dtype
    assert rows_of(found) == rows_of(wanted)


@pytest.mark.parametrize("form", ["csv", "parquet", "npz", "safetensors"])
def test_each_form_gives_the_arrays_of_the_simulation(visits, tmp_path, form):
    rows, data, offer = visits
    for name in ("north", "south"):
        wanted = data.clients[name]
        path = tmp_path / f"{name}.{form}"
        if form == "csv":
            write_csv(path, rows[name])
        elif form == "parquet":
            table = pyarrow.csv.read_csv(write_csv(tmp_path / "own.csv", rows[name]))
            pyarrow.parquet.write_table(table, path)
        elif form == "npz":
            np.savez(path, x=wanted.x.numpy(), y=wanted.y.numpy())
        else:
            write_arrays(path, wanted)
        equal(ClientData(path).arrays(offer), wanted)


def test_the_order_of_columns_and_other_columns_change_nothing(visits, tmp_path):
    rows, data, offer = visits
    mixed = [{**row, "secret": 3} for row in rows["north"]]
    path = write_csv(tmp_path / "own.csv", mixed, ["secret", "job", "outcome", "pressure", "age"])
    equal(ClientData(path).arrays(offer), data.clients["north"])


def test_a_delimiter_of_its_own_is_seen_or_given_as_a_key(visits, tmp_path):
    rows, data, offer = visits
    path = write_csv(tmp_path / "own.csv", rows["north"])
    path.write_text(path.read_text().replace(",", ";"))
    for keys in ({}, {"delimiter": ";"}):
        equal(ClientData(path, keys).arrays(offer), data.clients["north"])


def european(folder, rows):
    """Writes a table with semicolons, decimal commas and an umlaut in latin-1."""
    path = write_csv(
        folder, [{**row, "job": row["job"].replace("nurse", "ärztin")} for row in rows]
    )
    text = path.read_text().replace(",", ";").replace(".", ",")
    path.write_bytes(text.encode("latin-1"))
    return path


def test_a_table_is_read_as_the_recipe_reads_the_servers(visits, tmp_path):
    rows = visits[0]
    path = european(tmp_path / "european.csv", [row for part in rows.values() for row in part])
    text = TABLE.format(path=path).replace(
        "[model]", 'delimiter = ";"\ndecimal = ","\nencoding = "latin-1"\n[model]'
    )
    data, offer = offer_of(text)
    own = european(tmp_path / "own.csv", rows["north"])
    equal(ClientData(own).arrays(offer), data.clients["north"])
    # This one is written in the other way.
    plain = own.read_bytes().decode("latin-1").replace(",", ".").replace(";", ",")
    own.write_text(plain)
    equal(ClientData(own, {"encoding": "utf-8"}).arrays(offer), data.clients["north"])


def test_rows_with_gaps_are_left_out_if_the_recipe_drops_them(visits, tmp_path):
    rows = visits[0]
    gaps = [{**row, "age": ""} for row in rows["north"][:3]]
    everything = [row for part in rows.values() for row in part]
    path = write_csv(tmp_path / "all.csv", [*everything, *gaps])
    data, offer = offer_of(TABLE.format(path=path).replace("[model]", 'missing = "drop"\n[model]'))
    own = write_csv(tmp_path / "own.csv", [*gaps, *rows["north"]])
    equal(ClientData(own).arrays(offer), data.clients["north"])


@pytest.mark.parametrize("kind", ["word", "integer id"])
def test_labels_are_of_the_type_that_the_recipe_gives_them(visits, tmp_path, kind):
    codes = {"healthy": "01", "ill": "1"}
    rows = {
        name: [{**row, "outcome": codes[row["outcome"]]} for row in part]
        for name, part in visits[0].items()
    }
    path = write_csv(tmp_path / "codes.csv", [row for part in rows.values() for row in part])
    text = TABLE.format(path=path).replace("[model]", f'types = {{ outcome = "{kind}" }}\n[model]')
    data, offer = offer_of(text)
    assert data.class_names == ("01", "1")
    own = write_csv(tmp_path / "own.csv", rows["north"])
    equal(ClientData(own).arrays(offer), data.clients["north"])
    # What is no id has no class. An error would send the value to the server.
    own.write_text(own.read_text() + "north,50,140.0,cook,secret\n")
    equal(ClientData(own).arrays(offer), data.clients["north"])


def test_an_unknown_label_is_of_the_class_other_if_the_recipe_says_so(visits, tmp_path):
    rows = visits[0]
    strange = [{**row, "outcome": "unclear"} for row in rows["north"][:3]]
    everything = [row for part in rows.values() for row in part]
    path = write_csv(tmp_path / "all.csv", [*everything, *strange])
    text = TABLE.format(path=path).replace("[model]", 'unknown = "other"\n[model]')
    text = text.replace("in_features = 5, num_classes = 2", "hidden = [4]")
    data, offer = offer_of(text)
    own = write_csv(tmp_path / "own.csv", [*strange, *rows["north"]])
    equal(ClientData(own).arrays(offer), data.clients["north"])


def test_rows_with_an_unknown_label_are_left_out(visits, tmp_path):
    rows, data, offer = visits
    strange = [{**row, "outcome": "unclear"} for row in rows["north"][:3]]
    path = write_csv(tmp_path / "own.csv", [*strange, *rows["north"]])
    equal(ClientData(path).arrays(offer), data.clients["north"])


def test_a_client_that_lacks_a_class_keeps_the_numbers_of_the_others(visits, tmp_path):
    rows, data, offer = visits
    ill = [row for row in rows["north"] if row["outcome"] == "ill"]
    found = ClientData(write_csv(tmp_path / "own.csv", ill)).arrays(offer)
    wanted = data.clients["north"]
    (number,) = set(found.y.tolist())
    assert len(ill) == int((wanted.y == number).sum())
    assert rows_of(found) == [row for row in rows_of(wanted) if row[1] == number]


@pytest.mark.parametrize("column", ["age", "job", "outcome"])
def test_a_missing_column_is_named_beside_those_that_are_there(visits, tmp_path, column):
    rows, _, offer = visits
    path = write_csv(tmp_path / "own.csv", rows["north"], [c for c in COLUMNS if c != column])
    with pytest.raises(DataError, match=f"lacks the columns {column} ") as caught:
        ClientData(path).arrays(offer)
    assert str(path) in str(caught.value.place)


def test_renamed_columns_are_named_one_by_one_and_their_order_does_not_matter(visits, tmp_path):
    rows, data, offer = visits
    renamed = [
        {
            **row,
            "patient_age": row["age"],
            "blood_pressure": row["pressure"],
        }
        for row in rows["north"]
    ]
    columns = ["patient_age", "blood_pressure", "job", "outcome"]
    path = write_csv(tmp_path / "own.csv", renamed, columns)
    with pytest.raises(DataError, match="lacks the columns age, pressure ") as caught:
        ClientData(path).arrays(offer)
    assert "'pressure': did you mean 'blood_pressure'?" in str(caught.value)
    moved = write_csv(tmp_path / "moved.csv", rows["north"], [*reversed(COLUMNS)])
    equal(ClientData(moved).arrays(offer), data.clients["north"])


def test_labels_that_nobody_knows_are_told_with_those_that_are_expected(visits, tmp_path):
    rows, _, offer = visits
    path = write_csv(tmp_path / "own.csv", [{**row, "outcome": "x"} for row in rows["north"]])
    with pytest.raises(DataError, match="no row") as caught:
        ClientData(path).arrays(offer)
    assert "healthy, ill" in str(caught.value)


def test_a_column_of_numbers_with_a_word_in_it_is_told_without_the_word(visits, tmp_path):
    rows, _, offer = visits
    wrong = [
        {**row, "age": "Meyer" if at == 3 else row["age"]} for at, row in enumerate(rows["north"])
    ]
    with pytest.raises(DataError) as caught:
        ClientData(write_csv(tmp_path / "own.csv", wrong)).arrays(offer)
    # What is told reaches the server.
    assert "Meyer" not in str(caught.value)


@pytest.fixture
def scans(tmp_path):
    """Returns a folder of images, the data of the simulation, and the offer."""
    root = tmp_path / "scans"
    drawn = np.random.default_rng(0)
    for client in ("open", "test", "north", "south"):
        for label in ("cat", "dog"):
            folder = root / client / label
            folder.mkdir(parents=True)
            for at in range(6):
                pixels = drawn.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{at}.png")
    data, offer = offer_of(IMAGES.format(path=root))
    return root, data, offer


def test_a_folder_of_images_gives_the_arrays_of_the_simulation(scans):
    root, data, offer = scans
    for name in ("north", "south"):
        equal(ClientData(root / name).arrays(offer), data.clients[name])


def test_folders_of_other_labels_are_left_out_and_none_is_an_error(scans):
    root, data, offer = scans
    (root / "north" / "bird").mkdir()
    (root / "north" / "bird" / "0.png").write_bytes(b"not read")
    equal(ClientData(root / "north").arrays(offer), data.clients["north"])
    with pytest.raises(DataError, match="none of the folders cat, dog"):
        ClientData(root).arrays(offer)


def test_a_damaged_image_is_an_error(scans):
    root, _, offer = scans
    (root / "north" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="image"):
        ClientData(root / "north").arrays(offer)


def test_images_for_a_table_and_a_table_for_images_say_what_is_needed(visits, scans, tmp_path):
    rows, _, of_table = visits
    root, _, of_images = scans
    with pytest.raises(DataError, match="no square images"):
        ClientData(root / "north").arrays(of_table)
    with pytest.raises(DataError, match="no table") as caught:
        ClientData(write_csv(tmp_path / "own.csv", rows["north"])).arrays(of_images)
    assert "prepared arrays" in caught.value.cure


@pytest.mark.parametrize(
    ("x", "y", "problem"),
    [
        (torch.zeros(4, 6), torch.zeros(4).long(), r"shape \[6\], but the recipe needs \[5\]"),
        (torch.zeros(4, 5, 1), torch.zeros(4).long(), "shape"),
        (torch.full((4, 5), torch.nan), torch.zeros(4).long(), "NaN"),
        (torch.full((4, 5), torch.inf), torch.zeros(4).long(), "NaN or infinite"),
        (torch.zeros(4, 5), torch.tensor([0, 1, 2, 0]), "no class number"),
        (torch.zeros(4, 5), torch.tensor([0, 1, -1, 0]), "no class number"),
        (torch.zeros(4, 5), torch.rand(4), "int64"),
        (torch.zeros(4, 5), torch.zeros(3).long(), "4"),
        (torch.zeros(0, 5), torch.zeros(0).long(), "no examples"),
    ],
)
@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_prepared_arrays_of_another_layout_are_refused(visits, tmp_path, form, x, y, problem):
    path = tmp_path / f"own.{form}"
    if form == "npz":
        np.savez(path, x=x.numpy(), y=y.numpy())
    else:
        save_file({"x": x, "y": y}, path)
    with pytest.raises(DataError, match=problem) as caught:
        ClientData(path).arrays(visits[2])
    assert caught.value.cure


def broken_files(folder):
    """Yields files that hold no examples."""
    for name, content in (("a.npz", b"garbage"), ("a.safetensors", b"garbage"), ("b.npz", b"")):
        (folder / name).write_bytes(content)
        yield folder / name
    np.savez(folder / "c.npz", x=np.zeros(3))
    yield folder / "c.npz"
    np.savez(folder / "d.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    yield folder / "d.npz"
    np.savez(folder / "e.npz", x=np.array(["a", "b"]), y=np.zeros(2))
    yield folder / "e.npz"
    save_file({"y": torch.zeros(1)}, folder / "c.safetensors")
    yield folder / "c.safetensors"
    np.save(folder / "f.npy", np.zeros(3))
    (folder / "f.npy").rename(folder / "f.npz")
    yield folder / "f.npz"
    yield folder / "missing.npz"
    np.savez(folder / "g.npz", x=np.float32(1), y=np.int64(1))
    yield folder / "g.npz"


def test_a_file_without_examples_is_named(tmp_path):
    for path in broken_files(tmp_path):
        with pytest.raises(DataError) as caught:
            read_arrays(path)
        assert str(path) in str(caught.value), path
        assert caught.value.cure


@pytest.mark.parametrize("name", ["missing.csv", "data.doc", "data"])
def test_a_path_that_is_none_is_told_before_anything_begins(tmp_path, name):
    if not name.startswith("missing"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=name):
        ClientData(tmp_path / name)


def test_several_inputs_are_written_and_read_by_their_names(tmp_path):
    arrays = Arrays(
        NamedInputs({"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}), torch.arange(3)
    )
    write_arrays(tmp_path / "a.safetensors", arrays)
    found = read_arrays(tmp_path / "a.safetensors")
    assert list(found.x) == ["ids", "mask"]
    assert torch.equal(found.x["ids"], arrays.x["ids"])
    assert torch.equal(found.y, arrays.y)


def test_what_a_check_says_holds_no_value(visits, tmp_path):
    _, _, offer = visits
    secret = 123.456
    arrays = Arrays(torch.full((2, 6), secret), torch.zeros(2).long())
    with pytest.raises(DataError) as caught:
        check_layout(arrays, offer, "own")
    assert "123" not in str(caught.value)
