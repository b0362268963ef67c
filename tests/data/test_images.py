import io

import numpy as np
import pytest
from PIL import Image

from fedpress.data import images
from fedpress.errors import DataError

RNG = np.random.default_rng(0)


def encode(pixels: np.ndarray, kind: str = "PNG", **keys) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **keys)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "keys"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_images_come_back_exactly(kind, keys):
    pixels = RNG.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    got = images.decode([encode(image, kind, **keys) for image in pixels], where=str)
    assert np.array_equal(got.numpy(), pixels.transpose(0, 3, 1, 2))


def test_grey_images_have_one_channel_and_a_later_colour_image_becomes_grey():
    grey, colour = np.full((2, 2), 7, dtype=np.uint8), np.full((2, 2, 3), 9, dtype=np.uint8)
    assert images.decode([encode(grey), encode(colour)], where=str)[:, 0, 0, 0].tolist() == [7, 9]
    assert images.decode([encode(colour), encode(grey)], where=str).shape == (2, 3, 2, 2)


def test_images_of_other_sizes_are_refused_or_resized():
    blobs = [encode(np.full((4, 4), 100, np.uint8)), encode(np.full((6, 8), 100, np.uint8))]
    with pytest.raises(DataError, match=r"^1: an image of 6x8 pixels where the first has 4x4; set image_size"):
        images.decode(blobs, where=str)
    assert images.decode(blobs, where=str, size=3).tolist() == [[[[100] * 3] * 3]] * 2


@pytest.mark.parametrize("broken", [b"", None, b"no image", encode(RNG.integers(0, 256, (9, 9), dtype=np.uint8))[:70]])
def test_a_corrupt_image_is_named(broken):
    with pytest.raises(DataError, match=r"^row 1: not a readable image"):
        images.decode([encode(np.zeros((9, 9), np.uint8)), broken], where=lambda i: f"row {i}")


def test_progress_ends_at_the_number_of_images(monkeypatch):
    monkeypatch.setattr(images, "REPORT_EVERY", 2)
    told = []
    images.decode([encode(np.zeros((1, 1), np.uint8))] * 5, where=str, progress=lambda *now: told.append(now))
    assert told == [("decoding images", done, 5) for done in (2, 4, 5)]


def test_no_images_are_an_empty_tensor():
    assert images.decode([], where=str).shape[0] == 0
