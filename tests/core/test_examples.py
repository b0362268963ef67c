import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedpress.core.examples import Arrays, Preprocess, resized
from fedpress.errors import DataError
from tests.chance import generator

IMAGES = array_shapes(min_dims=4, max_dims=4, max_side=5)
FEATURES = array_shapes(min_dims=2, max_dims=3, max_side=6)


def wide(values):
    """Channels as rows, in float64."""
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)


def test_examples_and_labels_are_taken_together():
    data = Arrays(torch.arange(12.0).view(4, 3), torch.tensor([5, 6, 7, 8]))
    part = data.take(torch.tensor([3, 0, 3]))
    assert len(data) == 4
    assert part.y.tolist() == [8, 5, 8]
    assert part.x[:, 0].tolist() == [9, 0, 9]
    assert len(data.take(torch.tensor([], dtype=torch.int64))) == 0


def test_every_example_needs_a_label():
    with pytest.raises(DataError, match="y: 3 examples but 2 labels; give one label"):
        Arrays(torch.zeros(3, 1), torch.zeros(2))


@settings(max_examples=40, deadline=None)
@given(arrays(np.uint8, IMAGES))
def test_bytes_are_fitted_and_standardised_as_numpy_does(values):
    rows = wide((values / np.float32(255)).astype(np.float32))
    std = rows.std(1)
    std[values.max((0, 2, 3)) == values.min((0, 2, 3))] = 1
    fitted = Preprocess.fit(torch.from_numpy(values))
    np.testing.assert_allclose(fitted.mean, rows.mean(1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(fitted.std, std, rtol=0, atol=1e-12)
    out = fitted(torch.from_numpy(values))
    shape = (1, -1, 1, 1)
    expected = (values / 255.0 - np.reshape(fitted.mean, shape)) / np.reshape(fitted.std, shape)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, FEATURES, elements=st.floats(-1e6, 1e6, width=32)))
def test_features_are_fitted_and_standardised_as_numpy_does(values):
    rows = wide(values)
    spread = (rows.max(1) > rows.min(1)) & (rows.std(1) > np.finfo(np.float32).tiny)
    std = np.where(spread, rows.std(1), 1)
    fitted = Preprocess.fit(torch.from_numpy(values))
    np.testing.assert_allclose(fitted.mean, rows.mean(1), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(fitted.std, std, rtol=1e-9, atol=1e-9)
    assert fitted(torch.from_numpy(values)).isfinite().all()


def test_the_fit_of_many_examples_takes_every_part_in():
    x = torch.cat([torch.zeros(5000, 1), torch.full((5000, 1), 2.0)])
    assert Preprocess.fit(x) == Preprocess((1.0,), (1.0,))
    grey = torch.cat([torch.zeros(5000, 1, 1, 1), torch.full((5000, 1, 1, 1), 255)]).to(torch.uint8)
    assert Preprocess.fit(grey) == Preprocess((0.5,), (0.5,))


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1, 1e10, -1e-12])
def test_a_constant_channel_becomes_zeros_of_std_one(value):
    x = torch.tensor([[value, 1.0], [value, 2.0], [value, 4.0]])
    fitted = Preprocess.fit(x)
    assert fitted.std[0] == 1.0
    assert fitted.std[1] != 1.0
    assert fitted(x)[:, 0].tolist() == [0, 0, 0]


def test_a_constant_channel_of_bytes_has_std_one():
    assert Preprocess.fit(torch.full((3, 1, 2, 2), 7, dtype=torch.uint8)).std == (1.0,)


def test_without_statistics_only_bytes_are_scaled():
    assert Preprocess()(torch.tensor([[0, 255]], dtype=torch.uint8)).tolist() == [[0, 1]]
    assert Preprocess()(torch.tensor([[0, 255.0]])).tolist() == [[0, 255]]


def test_one_statistic_serves_all_channels_and_another_number_is_refused():
    x = torch.ones(2, 3, 1, 1)
    assert Preprocess((0.5,), (0.5,))(x).flatten().tolist() == [1] * 6
    with pytest.raises(DataError, match="3 channels, but 2 means"):
        Preprocess((0.5, 0.5), (1.0, 1.0))(x)
    with pytest.raises(
        DataError, match="1 channels, but 3 means"
    ):  # not a grey image made into three channels
        Preprocess((0.5,) * 3, (1.0,) * 3)(x[:, :1])


@pytest.mark.parametrize(
    ("mean", "std"), [((0.0,), ()), ((0.0,), (0.0,)), ((0.0,), (float("nan"),)), ((), (1.0,))]
)
def test_statistics_that_cannot_be_are_refused(mean, std):
    with pytest.raises(DataError, match=r"std: got .*; give as many .*, every one above 0"):
        Preprocess(mean, std)


def test_nothing_is_fitted_on_no_examples_or_on_values_that_are_no_numbers():
    with pytest.raises(DataError, match="no public examples"):
        Preprocess.fit(torch.zeros(0, 3, 2, 2, dtype=torch.uint8))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or infinite"):
            Preprocess.fit(torch.tensor([[1.0, 2.0], [bad, 3.0]]))


def drawn(n=6, channels=3, height=8, width=8, dtype=torch.uint8):
    """Random images."""
    x = torch.randint(0, 256, (n, channels, height, width), generator=generator(0, "images"))
    return x.to(dtype)


def test_halving_an_image_averages_it():
    x = drawn(dtype=torch.float32)
    small = resized(x, 4)
    inner = small[:, :, 1:-1, 1:-1]
    weights = torch.tensor([1, 3, 3, 1.0]) / 8  # the triangle filter of a factor of two
    kernel = (weights[:, None] * weights).expand(3, 1, 4, 4)
    expected = torch.nn.functional.conv2d(x, kernel, stride=2, groups=3, padding=1)[
        :, :, 1:-1, 1:-1
    ]
    torch.testing.assert_close(inner, expected)
    assert torch.equal(resized(x.to(torch.uint8), 4), small.round().to(torch.uint8))


def test_resizing_keeps_a_plain_image_its_type_and_its_range():
    assert (resized(torch.full((2, 1, 9, 9), 255, dtype=torch.uint8), 4) == 255).all()
    negative = torch.full((2, 1, 9, 9), -1.5)
    torch.testing.assert_close(resized(negative, 4), torch.full((2, 1, 4, 4), -1.5))


def test_resizing_takes_oblong_images_all_parts_and_none():
    assert resized(drawn(2, 1, 9, 4), 4).shape == (2, 1, 4, 4)
    many = torch.arange(4100).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float()
    assert torch.equal(resized(many, 1).flatten(), torch.arange(4100.0))
    assert resized(torch.zeros(0, 1, 9, 9), 4).shape[0] == 0
    x = drawn()
    assert resized(x, 8) is x
