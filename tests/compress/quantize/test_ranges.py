import math

import pytest
import torch
from torch import nn

from fedpress.compress.quantize import calibrate_
from fedpress.errors import DataError, ModelError
from fedpress.nn.observers import OBSERVERS, Histogram
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, calculate_qparams
from fedpress.nn.quantized import quantize_layers_

BYTE = InputQuantization()


def seen(x):
    x = x.detach()
    histogram = Histogram(float(x.amin()), float(x.amax()))
    histogram.add_(x)
    return histogram


def ready(inputs, *, names=("0", "2")):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten())
    quantize_layers_(model, {n: QuantizationScheme(inputs=inputs) for n in names})
    return model


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_sets_the_range_of_each_layers_inputs(observer):
    model = ready(BYTE).train()
    batches = [*torch.randn(30, 2, 6, 6).split(8)]
    assert calibrate_(model, batches, observer=observer) == {}
    assert all(m.training for m in model.modules())
    plain = nn.functional.conv2d(torch.cat(batches), model[0].weight, model[0].bias).relu()
    low, high = OBSERVERS[observer](seen(plain), BYTE)
    scale, zero = calculate_qparams(torch.tensor(low), torch.tensor(high), BYTE)
    torch.testing.assert_close(model[2].input_scale.data, scale, rtol=1e-3, atol=0)
    assert model[2].input_zero_point == zero == 0
    assert 100 < model[0].input_zero_point < 156
    assert model[0].scheme.inputs == BYTE


def test_the_sign_gets_the_mean_size_as_its_scale():
    model = ready(InputQuantization(bits=1, middle=False), names=("0",))
    x = torch.randn(20, 2, 6, 6)
    calibrate_(model, [x[:13], x[13:]])
    torch.testing.assert_close(model[0].input_scale.data, x.abs().mean())


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_bit_gets_the_middle_of_each_channel_and_both_sides_are_seen(dynamic):
    model = ready(InputQuantization(bits=1, dynamic=dynamic), names=("0",))
    x = torch.randn(20, 2, 6, 6).relu() * torch.tensor([1.0, 9.0]).view(1, 2, 1, 1)
    calibrate_(model, [x[:13], x[13:]])
    middle = x.mean((0, 2, 3))
    torch.testing.assert_close(model[0].input_middle.data, middle)
    size = (x - middle.view(1, 2, 1, 1)).abs().mean()
    if not dynamic:
        torch.testing.assert_close(model[0].input_scale.data, size)
    seen = model[0].quantized_input(x).detach()
    assert len(seen[:, 0].unique()) == len(seen[:, 1].unique()) == 2
    # of all pairs middle - s and middle + s this one is the nearest in squares
    error = (seen - x).square().mean()
    sides = torch.where(x >= middle.view(1, 2, 1, 1), 1.0, -1.0)
    for other in (0.5, 0.9, 1.1, 2.0):
        assert ((middle.view(1, 2, 1, 1) + other * size * sides - x).square().mean()) > error


def test_one_bit_that_would_always_be_the_same_is_refused_by_name():
    x = torch.randn(8, 2, 6, 6).relu()
    with pytest.raises(DataError, match=r"'0' reads values of one sign only \(0 to .*middle"):
        calibrate_(ready(InputQuantization(bits=1, middle=False), names=("0",)), [x])
    for constant in (
        torch.zeros(8, 2, 6, 6),
        torch.full((8, 2, 6, 6), 0.3),
        -torch.ones(8, 2, 6, 6),
    ):
        for dynamic in (False, True):
            with pytest.raises(DataError, match="every channel that '0' reads is constant"):
                calibrate_(
                    ready(InputQuantization(bits=1, dynamic=dynamic), names=("0",)), [constant]
                )


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_input_has_a_range(observer, value):
    model = ready(BYTE, names=("0",))
    calibrate_(model, [torch.full((2, 2, 6, 6), value)], observer=observer)
    assert model[0].input_scale > 0
    got = model[0].quantized_input(torch.full((1, 2, 6, 6), value))
    torch.testing.assert_close(got.detach(), torch.full((1, 2, 6, 6), value), rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_name_the_layer(value):
    x = torch.zeros(2, 2, 6, 6)
    x[1, 1, 1, 1] = value
    with pytest.raises(DataError, match="batches: '0' receives NaN or infinite values"):
        calibrate_(ready(BYTE), [x])


def test_no_batches_and_wrong_batches_are_refused():
    with pytest.raises(DataError, match="there are no batches"):
        calibrate_(ready(BYTE), [])
    model = ready(BYTE)
    with pytest.raises(ModelError, match="cannot run on these examples"):
        calibrate_(model, [torch.zeros(2, 5, 6, 6)])
    assert model[0].scheme.inputs == BYTE
    assert not model[0]._forward_pre_hooks


def test_a_layer_that_never_runs_is_listed():
    model = ready(BYTE, names=("0",))
    model.add_module("idle", nn.Linear(2, 2))
    quantize_layers_(model, {"idle": QuantizationScheme(inputs=BYTE)})
    model.forward = lambda x: model[0](x)
    assert calibrate_(model, [torch.randn(2, 2, 6, 6)]) == {"idle": "forward never calls it"}
