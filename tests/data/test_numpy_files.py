import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedpress.data import DataSettings, load
from fedpress.errors import DataError

REAL = Path(os.environ.get("FEDPRESS_DATA", "/nowhere"))


def arrays(rows=60):
    x = np.arange(rows * 4, dtype=np.float64).reshape(rows, 4)
    client = np.array(["ann", "bob", "cat"])[np.arange(rows) % 3]
    return {"x": x, "y": np.arange(rows) % 2, "client": client}


def ask(path, **keys):
    keys = {"public_share": 0.3, "validation": 0, "mean": [0], "std": [1], **keys}
    return DataSettings(source="numpy", path=path, **keys)


def parts_of(data):
    return [data.public, data.validation, data.test, *data.clients.values()]


def test_arrays_of_a_file_belong_to_the_clients_of_its_array(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    data = load(ask(tmp_path / "a.npz"), 0)
    assert list(data.clients) == ["ann", "bob", "cat"]
    assert data.name == "a"
    for at, client in enumerate(data.clients.values()):
        row = client.x[:, 0] / 4
        assert (row % 3 == at).all()
        assert torch.equal(client.y, row.long() % 2)


def test_files_in_a_folder_give_the_same(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    (tmp_path / "b").mkdir()
    for name, array in arrays().items():
        np.save(tmp_path / "b" / f"{name}.npy", array)
    one, two = load(ask(tmp_path / "a.npz"), 0), load(ask(tmp_path / "b"), 0)
    for name, client in one.clients.items():
        assert torch.equal(client.x, two.clients[name].x)


def test_each_file_of_a_folder_is_a_client(tmp_path):
    for at, name in enumerate(["ann", "bob"]):
        np.savez(tmp_path / f"{name}.npz", x=np.full((30, 2), at), y=np.arange(30) % 2)
    data = load(ask(tmp_path), 0)
    assert [client.x.unique().item() for client in data.clients.values()] == [0, 1]


def test_without_clients_rows_are_dealt(tmp_path):
    np.savez(tmp_path / "a.npz", X=arrays()["x"], y=np.array(["no", "yes"])[np.arange(60) % 2])
    data = load(ask(tmp_path / "a.npz", num_clients=4), 0)
    assert len(data.clients) == 4
    assert data.class_names == ("no", "yes")


@pytest.mark.parametrize("colours", [False, True])
def test_images_and_their_test_set_are_found(tmp_path, colours):
    shape = (5, 7, 3) if colours else (5, 7)
    chance = np.random.default_rng(0)
    train = chance.integers(0, 256, (40, *shape), dtype=np.uint8)
    test = chance.integers(0, 256, (8, *shape), dtype=np.uint8)
    y = np.arange(40, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / "a.npz", x_train=train, y_train=y, x_test=test, y_test=y[:8])
    data = load(ask(tmp_path / "a.npz", num_clients=2), 0)
    assert data.example_shape == ((3, 5, 7) if colours else (1, 5, 7))
    wanted = test.transpose(0, 3, 1, 2) if colours else test[:, None]
    assert torch.equal(data.test.x, torch.from_numpy(wanted))
    assert data.test.y.tolist() == [0, 1] * 4
    assert sum(len(part) for part in parts_of(data)) == 48


def test_test_rows_are_no_client(tmp_path):
    found = arrays()
    names = {"x_train": found["x"], "y_train": found["y"], "who": found["client"]}
    np.savez(tmp_path / "a.npz", **names, x_test=found["x"][:6] + 1000, y_test=found["y"][:6])
    data = load(ask(tmp_path / "a.npz", client_column="who"), 0)
    assert list(data.clients) == ["ann", "bob", "cat"]
    assert (data.test.x >= 1000).all()
    assert len(data.test) == 6


def test_arrays_may_be_named_and_targets_be_numbers(tmp_path):
    x = arrays()["x"]
    np.savez(tmp_path / "a.npz", wave=x, load=x[:, 0] / 2)
    keys = {"feature_columns": ["wave"], "label_column": "load", "num_clients": 2}
    data = load(ask(tmp_path / "a.npz", **keys), 0)
    assert data.task.kind == "regression"
    assert torch.equal(data.public.y * 2, data.public.x[:, 0])


@pytest.mark.parametrize(
    ("changes", "keys", "message"),
    [
        ({"y": None}, {}, r"label_column: no array 'y' in '.*a.npz' .it has x, client"),
        ({"x": None}, {}, r"feature_columns: no array 'x' in .*; name the array with"),
        ({}, {"client_column": "who"}, r"client_column: no array 'who'"),
        (
            {"client": np.zeros(3)},
            {},
            r"client_column: 'client' has the shape \[3\], but there are",
        ),
        ({"y": np.zeros(3)}, {}, r"a.npz': 'x' has the shape \[60, 4\], but 'y' \[3\]; give one"),
        ({"x": np.full((60, 4), np.nan)}, {}, r"NaN or infinite"),
        ({"y": np.array([{}] * 60)}, {}, r"it holds Python objects, which are not loaded"),
        ({"x": np.zeros((60, 0))}, {}, r"no public examples|no examples|no values"),
        ({}, {"feature_columns": ["x", "y"]}, r"feature_columns: names 2 arrays"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path, changes, keys, message):
    found = {name: array for name, array in {**arrays(), **changes}.items() if array is not None}
    np.savez(tmp_path / "a.npz", **found)
    with pytest.raises(DataError, match=message):
        load(ask(tmp_path / "a.npz", **{"mean": [], "std": [], **keys}), 0)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such path"):
        load(ask(tmp_path / "no.npz"), 0)
    with pytest.raises(DataError, match=r"no .npz or .npy file in"):
        load(ask(tmp_path), 0)
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"a .npy file has one array.*; put x.npy and y.npy"):
        load(ask(tmp_path / "x.npy"), 0)
    for name, text in (("a.npz", b"PK\x03\x04x"), ("b.npz", b"hello"), ("c.npz", b"")):
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / name).write_bytes(text)
        with pytest.raises(DataError, match=rf"{name}': not a readable file"):
            load(ask(tmp_path / "d" / name), 0)


@pytest.mark.skipif(not (REAL / "pneumonia_mnist").is_dir(), reason="needs FEDPRESS_DATA")
def test_x_rays_are_read_as_they_were_published():
    path = REAL / "pneumonia_mnist" / "pneumoniamnist.npz"
    data = load(ask(path, num_clients=5, mean=[], std=[]), 0)
    assert data.example_shape == (1, 28, 28)
    with np.load(path) as file:
        assert torch.equal(data.test.x[:, 0], torch.from_numpy(file["test_images"]))
        assert data.test.y.tolist() == file["test_labels"][:, 0].tolist()
