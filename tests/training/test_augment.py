import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedpress.training.augment import Augment, augment, cutout, random_shift
from tests.chance import generator

ALL = Augment(crop=0.25, flip="random", cutout=0.5)


def images(n=6, channels=3, height=8, width=8, dtype=torch.uint8, seed=0):
    x = torch.randint(0, 256, (n, channels, height, width), generator=generator(seed, "images"))
    return x.to(dtype)


def slow_shift(x, most, chance):
    """The shift of one image at a time: pad by reflection, cut out a window."""
    most = min(most, x.shape[2] - 1, x.shape[3] - 1)
    dy, dx = torch.randint(0, 2 * most + 1, (2, len(x)), generator=chance).tolist()
    out = []
    for image, top, left in zip(x, dy, dx, strict=True):
        padded = torch.nn.functional.pad(image.double()[None], (most,) * 4, mode="reflect")[0]
        out.append(padded[:, top : top + x.shape[2], left : left + x.shape[3]])
    return torch.stack(out).to(x.dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 12),
    st.integers(0, 99),
)
def test_the_shift_equals_padding_and_cutting_each_image(n, channels, height, width, most, seed):
    x = images(n, channels, height, width)
    fast = random_shift(x, most, generator(seed, "shift"))
    assert torch.equal(fast, slow_shift(x, most, generator(seed, "shift")))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_type_and_shape_stay_and_the_input_too(dtype):
    x = images(dtype=dtype)
    before = x.clone()
    out = augment(x, ALL, generator(0))
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert torch.equal(x, before)
    assert not torch.equal(out, x)


def test_no_digit_of_a_float64_is_lost():
    x = torch.full((2, 1, 4, 4), 1 + 2.0**-40, dtype=torch.float64)
    assert torch.equal(augment(x, Augment(crop=0.25, flip="random"), generator(0)), x)


def test_alternate_flip_shows_both_sides_in_two_epochs_and_each_once():
    x, start = images(), torch.tensor([True, False, True, True, False, False])
    how = Augment(flip="alternate")
    even, odd = (augment(x, how, generator(0), flipped=start ^ (epoch == 1)) for epoch in (0, 1))
    for image, one, two, mirrored in zip(x, even, odd, start, strict=True):
        assert torch.equal(one, image.flip(-1) if mirrored else image)
        assert torch.equal(two, image if mirrored else image.flip(-1))


def test_random_flip_mirrors_about_half_and_nothing_else():
    x = images(400, 1, 2, 3)
    out = augment(x, Augment(flip="random"), generator(1))
    mirrored = (out == x.flip(-1)).all(-1).all(-1).flatten()
    assert (mirrored | (out == x).all(-1).all(-1).flatten()).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize(("dtype", "grey"), [(torch.uint8, 128), (torch.float32, 0.0)])
@pytest.mark.parametrize("side", [1, 4, 5, 20])
def test_cutout_greys_one_square_that_may_hang_over_the_border(dtype, grey, side):
    x = torch.full((200, 2, 9, 9), 7).to(dtype)
    out = cutout(x, side, generator(0))
    assert ((out == 7) | (out == grey)).all()
    assert torch.equal(out[:, 0], out[:, 1])
    changed = (out[:, 0] == grey).long()
    rows, columns = changed.amax(2).sum(1), changed.amax(1).sum(1)
    assert torch.equal(changed.sum((1, 2)), rows * columns)  # a rectangle
    assert rows.amax() == columns.amax() == min(side, 9)
    assert rows.amin() >= min((side + 1) // 2, 9) > 0  # the centre is inside


def test_cutout_covers_every_pixel_at_some_time():
    out = cutout(torch.ones(500, 1, 5, 5), 2, generator(0))
    assert ((out == 0).sum(0) > 0).all()


@pytest.mark.parametrize("shape", [(4, 3, 1, 1), (0, 3, 8, 8), (4, 1, 1, 6), (1, 1, 2, 2)])
def test_the_smallest_images_pass(shape):
    x = torch.zeros(shape, dtype=torch.uint8)
    assert augment(x, ALL, generator(0)).shape == shape


def test_what_is_no_image_and_settings_that_change_nothing_leave_the_batch_alone():
    x = torch.rand(4, 7)
    assert augment(x, ALL, generator(0)) is x
    picture = images()
    assert augment(picture, Augment(), generator(0)) is picture
    assert not Augment().active
    assert Augment(cutout=0.1).active


def test_the_generator_alone_decides():
    x = images(50)
    torch.manual_seed(0)
    first = augment(x, ALL, generator(1))
    torch.manual_seed(1)
    assert torch.equal(augment(x, ALL, generator(1)), first)
    assert not torch.equal(augment(x, ALL, generator(2)), first)


@pytest.mark.parametrize(
    "wrong", [{"crop": 0.6}, {"crop": -0.1}, {"cutout": 1.0}, {"flip": "vertical"}, {"flop": 1}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        Augment(**wrong)
