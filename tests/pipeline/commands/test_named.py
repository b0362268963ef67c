"""Commands on models of several inputs by name."""

import pytest
import torch
from torch.utils.data import DataLoader

import fedpress
from fedpress.errors import DataError, FedpressError
from tests import named
from tests.harness import finish


def data(n=80):
    x, y = named.person(0, n)
    return {name: torch.as_tensor(x[name]) for name in x}, torch.as_tensor(y)


def items(n=40):
    x, y = data(n)
    return [({name: x[name][i] for name in x}, int(y[i])) for i in range(n)]


@pytest.mark.parametrize("given", [data(), DataLoader(items(), batch_size=8)])
def test_a_module_in_memory_learns_and_is_cut(given):
    torch.manual_seed(0)
    trained = fedpress.train(named.Notes(), data=given, epochs=6, lr=0.2, batch_size=16)
    assert trained.after["accuracy"] > 0.6
    small = fedpress.prune(trained.model, data=given, keep_params=0.6, round_to=1)
    assert small.after["parameters"] < 0.62 * trained.after["parameters"]


@pytest.mark.recipe
def test_a_file_is_written_from_inputs_alone():
    exported = fedpress.export(named.Notes(), data=data()[0])
    assert [name for name in exported.files if name.endswith(".onnx")]


def test_the_folder_of_a_run_is_enough(tmp_path):
    finish(named.recipe(named.TRAIN), tmp_path / "run")
    small = fedpress.prune(tmp_path / "run", keep_params=0.6, round_to=1)
    assert small.after["accuracy"] is not None
    alone = fedpress.quantize(next((tmp_path / "run" / "stages").iterdir()), inputs="dynamic")
    assert alone.model is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "data: there is no input"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, "data: the inputs have different numbers"),
        ([({"a": 1.0}, 0), ({"b": 1.0}, 1)], "its items have different shapes"),
        ([({"a": "word"}, 0)], "an item contains dict, not a tensor"),
        ([{"a": 1.0}], "its items are dictionaries; give pairs"),
    ],
)
def test_what_is_no_data_is_refused(given, message):
    given = (
        DataLoader(given, batch_size=1, collate_fn=lambda rows: rows[0])
        if isinstance(given, list)
        else given
    )
    with pytest.raises(DataError, match=message):
        fedpress.train(named.Notes(), data=given, epochs=1)


def test_other_names_than_those_of_forward_are_told():
    x, y = data()
    other = {("words" if name == "tokens" else name): x[name] for name in x}
    with pytest.raises(FedpressError, match="the model also needs 'tokens' and does not take"):
        fedpress.train(named.Notes(), data=(other, y), epochs=1)
