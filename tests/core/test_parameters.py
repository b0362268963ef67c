import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from fedpress.core.parameters import TINY, Layout, assign_, change, flatten, trainable
from fedpress.errors import WireError


def network():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 1))
    model[1].bias.requires_grad_(False)
    return model


def test_the_layout_names_what_trains_in_the_order_of_the_vector():
    model = network()
    layout = Layout.of(model)
    assert layout.names == ("0.weight", "1.weight", "2.weight", "2.bias")
    assert layout.shapes == ((3, 2, 2, 2), (3,), (1, 3), (1,))
    assert layout.size == 24 + 3 + 3 + 1 == flatten(model).numel()
    assert [tuple(p.shape) for p in trainable(model)] == [*layout.shapes]
    expected = torch.cat([model.get_parameter(name).flatten() for name in layout.names])
    assert torch.equal(flatten(model), expected)


@settings(max_examples=30, deadline=None)
@given(arrays("float32", 31, elements=st.floats(width=32)))
def test_assigning_a_vector_and_flattening_give_it_back(values):
    model, vector = network(), torch.from_numpy(values)
    frozen, mean = model[1].bias.clone(), model[1].running_mean.clone()
    assign_(model, vector)
    assert torch.equal(
        flatten(model).view(torch.int32), vector.view(torch.int32)
    )  # NaN and -0 too, bit by bit
    assert torch.equal(model[1].bias, frozen)
    assert torch.equal(model[1].running_mean, mean)


def test_the_memory_format_does_not_change_the_vector():
    model = network()
    plain = flatten(model)
    model.to(memory_format=torch.channels_last)
    assert torch.equal(flatten(model), plain)
    assign_(model, plain + 1)
    assert torch.equal(flatten(model), plain + 1)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_flat_vector_is_a_copy():
    model = nn.Linear(1, 1, bias=False)
    vector = flatten(model)
    vector += 1
    assert torch.equal(flatten(model) + 1, vector)


def test_a_shared_parameter_is_written_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert Layout.of(model).size == 4
    assign_(model, torch.arange(4.0))
    assert model[1].weight.flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("shape", [(30,), (32,), (1, 31), (0,), ()])
def test_a_vector_of_another_shape_is_refused_and_changes_nothing(shape):
    model = network()
    before = flatten(model)
    with pytest.raises(
        WireError, match=r"the model trains 31 values; send a vector of shape \[31\]"
    ):
        assign_(model, torch.zeros(shape))
    assert torch.equal(flatten(model), before)


def test_a_model_that_trains_nothing_is_an_empty_vector():
    model = nn.Linear(2, 2).requires_grad_(False)
    assert flatten(model).shape == (0,)
    assert Layout.of(model) == Layout((), ())
    assert Layout.of(model).size == 0
    assign_(model, torch.zeros(0))
    assert change(model, torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("width", [3, 300])  # below and above the size that is copied
def test_the_change_is_the_difference_of_the_flat_vectors(width):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 2))
    start = torch.linspace(-1, 1, Layout.of(model).size)
    before = flatten(model)
    assert (len(start) > TINY) == (width == 300)
    assert change(model, start).equal(before - start)
    assert flatten(model).equal(before)
