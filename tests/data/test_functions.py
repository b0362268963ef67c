import sys
import types

import numpy as np
import pytest
import torch

from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import DataSettings, FederatedData, load
from fedpress.errors import DataError


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable module for a test to put its function into."""
    module = types.ModuleType("own_module")
    monkeypatch.setitem(sys.modules, "own_module", module)
    return module


def ask(name: str = "make", **keys) -> DataSettings:
    return DataSettings(
        source=f"own_module:{name}", **{"validation": 0, "public_words": ["label"], **keys}
    )


def test_a_dict_of_clients_is_shared_out_by_the_settings(own):
    own.make = lambda: {
        "ann": (np.arange(20.0).reshape(10, 2), np.arange(10) % 2),
        7: Arrays(torch.arange(20.0, 40.0).reshape(10, 2), torch.arange(10) % 3),
    }
    data = load(ask(), 0)
    assert (list(data.clients), data.num_classes, len(data.test)) == (["ann", "7"], 3, 4)
    assert data.clients["ann"].x.max() < 20 <= data.clients["7"].x.min()


def test_words_as_labels_are_coded_together(own):
    own.make = lambda: {"a": (np.zeros((5, 1)), ["x"] * 5), "b": (np.zeros((5, 1)), ["y"] * 5)}
    data = load(ask(), 0)
    assert data.class_names == ("x", "y")
    assert data.clients["b"].y.tolist() == [1] * 4


def test_path_and_seed_are_given_to_a_function_that_takes_them(own, tmp_path):
    asked = {}

    def make(seed, path, other=3):
        asked.update(seed=seed, path=path, other=other)
        return {"a": (np.zeros((5, 1, 2, 2), np.uint8), [0, 1, 0, 1, 0])}

    own.make = make
    load(ask(path=tmp_path), 5)
    assert asked == {"seed": 5, "path": tmp_path, "other": 3}


def test_a_federated_data_set_is_used_as_it_is(own):
    part = Arrays(torch.zeros(2, 3), torch.tensor([0, 1]))
    made = FederatedData("mine", {"a": part}, part, part, part, 2, ("n", "y"), Preprocess())
    own.make = lambda: made
    assert load(ask(), 0) is made


X = np.zeros((4, 2))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned NoneType; expected FederatedData, a dict"),
        ({}, "returned dict; expected"),
        ({"a": (X, [0, 1])}, "client 'a': 4 examples in x but 2 targets in y; give"),
        ({"a": (X[:0], [])}, "client 'a': no examples"),
        ({"a": 3}, "client 'a': expected a pair of arrays"),
        (
            {"a": (X, [0] * 4, 7)},
            r"client 'a': expected a pair of arrays \(x, y\), got tuple of 3$",
        ),
        ({"a": ([["x"]], [1])}, "client 'a': expected a pair of arrays"),
        ({"a": (X, [0.5] * 4), "b": (X, np.zeros((4, 2)))}, "clients' targets differ in shape"),
        ({"a": (X, [-1] * 4)}, "labels of type negative numbers; expected"),
        ({"a": (X, [0] * 4), "b": (np.zeros((4, 3)), [0] * 4)}, "clients' examples differ"),
        ({"a": (np.zeros((4, 2), np.uint8), [0] * 4)}, r"expected uint8 images \[n, C, H, W\]"),
        ({"a": (X + np.nan, [0, 1, 0, 1])}, "client 'a': some features are NaN or infinite"),
    ],
)
def test_what_a_function_returns_is_checked(own, returned, message):
    own.make = lambda: returned
    with pytest.raises(DataError, match=message):
        load(ask(test_share=0.5), 0)


def test_missing_and_failing_functions_are_named(own):
    with pytest.raises(
        DataError,
        match=r"source 'no_such_module:f': no module 'no_such_module'; put its folder on PYTHON",
    ):
        load(DataSettings(source="no_such_module:f"), 0)
    own.make = lambda: 1 / 0
    with pytest.raises(
        DataError, match=r"failed with ZeroDivisionError: division by zero; correct it"
    ):
        load(ask(), 0)
    with pytest.raises(DataError, match=r"no function 'mak'; did you mean 'make'"):
        load(ask("mak"), 0)


def test_positions_without_any_class_are_refused(own):
    own.make = lambda: {"a": (np.zeros((4, 2)), np.full((4, 2), -100))}
    with pytest.raises(DataError, match="all labels are -100, which is no class; give some pos"):
        load(ask(task="classification"), 0)
