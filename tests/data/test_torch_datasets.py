import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fedpress.data import DataSettings, load
from fedpress.errors import DataError

X = torch.arange(120.0).reshape(40, 3)
Y = torch.arange(40) % 2


class Endless(Dataset):
    """A Dataset that only its length ends, as many do."""

    def __len__(self):
        return 40

    def __getitem__(self, at):
        return X[at % 40].numpy(), int(Y[at % 40])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


class Named(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, at):
        return {"ids": X[at].long(), "size": X[at, :1]}, Y[at]


FORMS = {
    "tensors": TensorDataset(X, Y),
    "endless": Endless(),
    "stream": Stream(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=7),
    "subset": torch.utils.data.Subset(TensorDataset(X, Y), range(40)),
}


def called(value, monkeypatch, tmp_path, **keys):
    """Loads what a function `mine:get` returns."""
    module = type(sys)("mine")
    module.get = lambda: value
    monkeypatch.setitem(sys.modules, "mine", module)
    keys = {"public_share": 0.3, "validation": 0, "mean": [0], "std": [1], **keys}
    return load(DataSettings(source="mine:get", **keys), 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_gives_the_rows_of_its_arrays(form, monkeypatch, tmp_path):
    found = called({"a": FORMS[form], "b": FORMS[form]}, monkeypatch, tmp_path)
    wanted = called({"a": (X, Y), "b": (X, Y)}, monkeypatch, tmp_path)
    for name, client in wanted.clients.items():
        assert torch.equal(found.clients[name].x, client.x)
        assert torch.equal(found.clients[name].y, client.y)


def test_a_dataset_alone_has_no_clients(monkeypatch, tmp_path):
    data = called(FORMS["endless"], monkeypatch, tmp_path, num_clients=4)
    assert len(data.clients) == 4
    held = [data.public, data.test, *data.clients.values()]
    assert sorted(torch.cat([part.x[:, 0] for part in held]).tolist()) == X[:, 0].tolist()


def test_items_may_be_several_inputs(monkeypatch, tmp_path):
    data = called({"a": Named(), "b": Named()}, monkeypatch, tmp_path, mean=[], std=[])
    assert data.example_shape == {"ids": (3,), "size": (1,)}
    assert data.public.x["ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TensorDataset(X), "client 'a': item 0 of the Dataset is tuple; expected pairs"),
        (TensorDataset(X[:0], Y[:0]), "client 'a': the Dataset has no items; leave it out"),
        ([], "expected a pair of arrays"),
    ],
)
def test_a_dataset_of_something_else_is_refused(value, message, monkeypatch, tmp_path):
    with pytest.raises(DataError, match=message):
        called({"a": value}, monkeypatch, tmp_path)


def test_items_of_several_shapes_are_refused(monkeypatch, tmp_path):
    class Ragged(Endless):
        def __getitem__(self, at):
            return np.zeros(at + 1), 0

    with pytest.raises(
        DataError, match=r"items of the Dataset differ in shape .*; make them alike"
    ):
        called({"a": Ragged()}, monkeypatch, tmp_path)
