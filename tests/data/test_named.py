"""Data sets whose examples are dictionaries of tensors."""

import sys
import types

import numpy as np
import pytest
import torch

from fedpress.core.examples import Arrays
from fedpress.core.inputs import NamedInputs
from fedpress.data import DataSettings, FederatedData, load
from fedpress.errors import DataError

KEYS = {"validation": 0.25, "public_share": 0.5, "num_clients": 3, "partition": {"kind": "iid"}}


def of_person(n: int, first: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns examples whose row can be told from each of their inputs."""
    at = np.arange(first, first + n)
    x = {
        "tokens": np.stack([at, at + 1, at + 2], 1),
        "lengths": 1 + at % 3,
        "sensors": at[:, None].astype(np.float64),
        "mask": at[:, None] % 2 == 0,
    }
    return x, at % 2


def loaded(monkeypatch, returned, **keys) -> FederatedData:
    module = types.ModuleType("own_named")
    module.make = lambda: returned
    monkeypatch.setitem(sys.modules, "own_named", module)
    return load(DataSettings(source="own_named:make", **{**KEYS, **keys}), 0)


@pytest.mark.parametrize(
    "partition", [{"kind": "iid"}, {"kind": "dirichlet", "alpha": 0.5}, {"kind": "natural"}]
)
def test_rows_of_all_inputs_are_dealt_together(monkeypatch, partition):
    people = {"ann": of_person(40), "bob": of_person(40, 40), "eve": of_person(40, 80)}
    data = loaded(monkeypatch, people, partition=partition)
    parts = [*data.clients.values(), data.public, data.validation, data.test]
    seen = torch.cat([part.x["sensors"].flatten() for part in parts]).long()
    assert sorted(seen.tolist()) == list(range(120))
    for part in parts:
        at = part.x["sensors"].flatten().long()
        assert torch.equal(part.x["tokens"][:, 2], at + 2)
        assert torch.equal(part.x["lengths"], 1 + at % 3)
        assert torch.equal(part.x["mask"][:, 0], at % 2 == 0)
        assert torch.equal(part.y, at % 2)
    first = data.clients[next(iter(data.clients))].x
    kinds = [torch.int64, torch.int64, torch.float32, torch.bool]
    assert [first[name].dtype for name in ("tokens", "lengths", "sensors", "mask")] == kinds
    assert data.describe()["shape"] == {"tokens": [3], "lengths": [], "sensors": [1], "mask": [1]}


def test_a_plain_dictionary_makes_a_data_set_in_memory():
    x, y = of_person(6)
    part = Arrays({name: torch.as_tensor(value).to(torch.int64) for name, value in x.items()},
                  torch.as_tensor(y))  # fmt: skip
    data = FederatedData("mine", {"a": part}, part, part, part, 2, ("n", "y"))
    assert isinstance(data.clients["a"].x, NamedInputs)
    assert data.example_shape == {"tokens": (3,), "lengths": (), "sensors": (1,), "mask": (1,)}


def without(x, name):
    return {key: value for key, value in x.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: {}, "client 'bob': there is no input; give at least one"),
        (
            lambda x: without(x, "mask"),
            "clients' examples differ: .* and .*mask.*; give all clients examples",
        ),
        (lambda x: {**x, "more": x["lengths"]}, "clients' examples differ"),
        (
            lambda x: {**x, "lengths": x["lengths"][:5]},
            "client 'bob': the inputs have different numbers of rows: 20 of 'tokens', 5 of 'leng",
        ),
        (lambda x: {**x, "tokens": x["tokens"][:, :2]}, "clients' examples differ"),
        (lambda x: {**x, "tokens": x["tokens"] * 1.0}, "clients' examples differ"),
        (lambda x: {**x, "tokens": x["tokens"].astype(np.uint8)}, "'tokens' holds torch.uint8 of"),
        (lambda x: {**x, "sensors": x["sensors"] * 1j}, "'sensors' holds torch.complex128"),
        (lambda x: {**x, "a b": x["lengths"]}, "client 'bob': 'a b' cannot be the name"),
        (
            lambda x: {**x, "sensors": np.where(x["sensors"] == 7, np.nan, x["sensors"])},
            "some features of 'sensors' are NaN or infinite; fill or leave out those rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(monkeypatch, change, message):
    x, y = of_person(20)
    with pytest.raises(DataError, match=message):
        loaded(monkeypatch, {"ann": of_person(20), "bob": (change(x), y)})


def test_parts_of_other_inputs_are_refused():
    x = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 1)}
    part, other = (Arrays(given, torch.tensor([0, 1])) for given in (x, without(x, "b")))
    with pytest.raises(DataError, match=r"test part: examples of a \[1\] float32, but the first"):
        FederatedData("mine", {"c": part}, part, part, other, 2, ("n", "y"))
    half = Arrays({"a": x["a"].half(), "b": x["b"]}, torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"examples of 'a' of type torch.float16"):
        FederatedData("mine", {"c": half}, part, part, part, 2, ("n", "y"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean": (0.5,), "std": (0.5,)}, "mean: .* leave mean and std out"),
        ({"image_size": 8}, "image_size: it resizes examples of a single image"),
    ],
)
def test_keys_for_one_tensor_are_refused(monkeypatch, keys, message):
    with pytest.raises(DataError, match=message):
        loaded(monkeypatch, {"ann": of_person(40)}, **keys)


def test_class_numbers_of_positions_are_targets(monkeypatch):
    x, _ = of_person(60)
    y = np.where(np.arange(3)[None] < x["lengths"][:, None], x["tokens"] % 3, -100)
    data = loaded(
        monkeypatch,
        {"ann": (x, y)},
        task="classification",
        partition={"kind": "dirichlet", "alpha": 0.3},
    )
    assert data.class_names == ("0", "1", "2")
    for part in data.clients.values():
        assert part.y.shape[1:] == (3,)
        at = torch.arange(3)[None] < part.x["lengths"][:, None]
        assert torch.equal(part.y, torch.where(at, part.x["tokens"] % 3, -100))


@pytest.mark.parametrize(
    ("y", "task", "message"),
    [
        (
            np.full((60, 3), -1),
            "classification",
            "some labels are negative numbers; expected class",
        ),
        (np.zeros((60, 3, 2), int), None, r"targets of shape \[60, 3, 2\]; expected \[n\]"),
        (
            np.zeros((60, 3, 2)),
            None,
            r"targets of shape \[60, 3, 2\]; expected \[n\] or \[n, k\]; .* a task of your own",
        ),
    ],
)
def test_targets_that_are_none_are_refused(monkeypatch, y, task, message):
    with pytest.raises(DataError, match=message):
        loaded(monkeypatch, {"ann": (of_person(60)[0], y)}, task=task)
