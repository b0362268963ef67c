import numpy as np
import torch
from sklearn.datasets import load_digits

from fedpress.data import DataSettings, load
from fedpress.data.load import SOURCES
from fedpress.data.settings import BUILT_IN


def test_every_built_in_source_has_a_reader():
    assert set(SOURCES) == set(BUILT_IN)


def test_digits_are_scikit_learns_digits_in_bytes():
    data = load(DataSettings(source="digits", examples_per_client=60, validation=100), 0)
    parts = [*data.clients.values(), data.public, data.validation, data.test]
    x = torch.cat([part.x for part in parts])
    assert x.dtype == torch.uint8
    assert x.shape == (1797, 1, 8, 8)
    pixels, labels = load_digits(return_X_y=True)
    wanted = sorted(
        (tuple(np.round(row * 255 / 16)), label)
        for row, label in zip(pixels, labels.tolist(), strict=True)
    )
    got = sorted(
        (tuple(image.flatten().tolist()), int(label))
        for part in parts
        for image, label in zip(part.x, part.y, strict=True)
    )
    assert got == wanted
    assert (len(data.validation), len(data.test)) == (100, 359)


def test_images_of_a_built_in_source_come_in_the_size_that_is_asked_for():
    plain, small = (
        load(DataSettings(source="digits", examples_per_client=60, image_size=s), 0)
        for s in (None, 4)
    )
    assert small.example_shape == (1, 4, 4)
    assert small.test.x.shape == (359, 1, 4, 4)
    blocks = plain.public.x.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert (
        float((small.public.x.float() - blocks).abs().mean()) < 25
    )  # the filter reaches a little further than a block


def test_loading_does_not_depend_on_what_was_drawn_before():
    settings = DataSettings(
        source="digits", examples_per_client=60, partition={"kind": "dirichlet", "alpha": 0.3}
    )
    first = load(settings, 0)
    torch.manual_seed(99)
    torch.rand(5)
    np.random.seed(3)
    second = load(settings, 0)
    assert first.describe() == second.describe()
    assert torch.equal(first.public.x, second.public.x)
