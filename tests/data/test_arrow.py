import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import torch

from fedpress.data import DataSettings, load
from fedpress.errors import DataError


def table(rows=40):
    chance = np.random.default_rng(0)
    return pa.table(
        {
            "ward": pa.array(["a", "b", "b", "c"] * (rows // 4)).dictionary_encode(),
            "dose": chance.normal(size=rows),
            "who": ["north", "south"] * (rows // 2),
            "label": ["no", "yes", "yes", "no"] * (rows // 4),
        }
    )


def write_stream(content, path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content)


def write_file(content, path):
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, content.schema) as writer:
        writer.write_table(content)


def write_feather(content, path):
    pyarrow.feather.write_feather(content, path, compression="zstd")


def write_old_feather(content, path):
    plain = content.set_column(0, "ward", content["ward"].cast(pa.string()))
    pyarrow.feather.write_feather(plain, path, version=1)


def ask(path, source="arrow", **keys):
    keys = {"client_column": "who", "public_share": 0.3, "validation": 2, **keys}
    return DataSettings(source=source, path=path, **keys)


@pytest.mark.filterwarnings("ignore:.*feather.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*Feather.*:DeprecationWarning")
@pytest.mark.parametrize("write", [write_stream, write_file, write_feather, write_old_feather])
def test_every_form_of_arrow_gives_the_rows_of_parquet(tmp_path, write):
    write(table(), tmp_path / "a.arrow")
    pq.write_table(table(), tmp_path / "a.parquet")
    found = load(ask(tmp_path / "a.arrow"), 0)
    wanted = load(ask(tmp_path / "a.parquet", "parquet"), 0)
    assert list(found.clients) == ["north", "south"]
    for name, client in wanted.clients.items():
        assert torch.equal(found.clients[name].x, client.x)
        assert torch.equal(found.clients[name].y, client.y)
    assert found.preparation == wanted.preparation


def test_files_of_a_folder_are_clients_whatever_their_suffix(tmp_path):
    for name in ("a.arrow", "b.feather", "c.ipc"):
        write_file(table().drop_columns("who"), tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    data = load(ask(tmp_path, client_column="file"), 0)
    assert list(data.clients) == ["a", "b", "c"]


def test_a_damaged_file_is_refused_by_its_name(tmp_path):
    write_file(table(), tmp_path / "a.arrow")
    whole = (tmp_path / "a.arrow").read_bytes()
    for cut in (0, 3, len(whole) // 2):
        (tmp_path / "a.arrow").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a.arrow': not a readable Arrow file"):
            load(ask(tmp_path / "a.arrow"), 0)
    with pytest.raises(DataError, match="no such path"):
        load(ask(tmp_path / "b.arrow"), 0)


def lists(values, **more):
    label = ["no", "yes"] * (len(values) // 2)
    return pa.table({"wave": values, "label": label, **more})


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (pa.list_(pa.float32()), (6,)),
        (pa.list_(pa.int16(), 6), (6,)),
        (pa.large_list(pa.list_(pa.float64())), (3, 2)),
    ],
)
def test_a_column_of_lists_becomes_one_array(tmp_path, kind, shape):
    numbers = np.arange(20 * 6).reshape(20, *shape)
    write_file(lists(pa.array(numbers.tolist(), kind)), tmp_path / "a.arrow")
    data = load(ask(tmp_path / "a.arrow", client_column=None, num_clients=2, std=[1], mean=[0]), 0)
    assert data.example_shape == shape
    parts = (data.public, data.validation, data.test, *data.clients.values())
    rows = torch.cat([part.x for part in parts])
    assert torch.equal(
        rows[rows.flatten(1)[:, 0].argsort()], torch.from_numpy(numbers.astype(np.float32))
    )


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ([1.0, 2.0, 3.0], "its lists have different lengths, from 2 to 3; make them equally long"),
        (None, "list 0 is missing"),
        ([1.0, None], "some numbers within its lists are missing"),
    ],
)
def test_lists_that_make_no_array_are_refused(tmp_path, first, message):
    values = [first] + [[1.0, 2.0]] * 19
    write_file(lists(pa.array(values, pa.list_(pa.float64()))), tmp_path / "a.arrow")
    with pytest.raises(DataError, match=f"feature column 'wave': {message}"):
        load(ask(tmp_path / "a.arrow", client_column=None, num_clients=2), 0)


def test_lists_of_words_are_refused(tmp_path):
    write_file(lists(pa.array([["a"]] * 20)), tmp_path / "a.arrow")
    with pytest.raises(DataError, match="its lists hold string; expected lists of numbers"):
        load(ask(tmp_path / "a.arrow", client_column=None, num_clients=2), 0)
