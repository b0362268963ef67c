import io
import zlib

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
    with pytest.raises(
        DataError, match=r"^1: an image of 6x8 pixels, but the first has 4x4; set image_size"
    ):
        images.decode(blobs, where=str)
    assert images.decode(blobs, where=str, size=3).tolist() == [[[[100] * 3] * 3]] * 2


@pytest.mark.parametrize(
    "broken", [b"", None, b"no image", encode(RNG.integers(0, 256, (9, 9), dtype=np.uint8))[:70]]
)
def test_a_corrupt_image_is_named(broken):
    with pytest.raises(DataError, match=r"^row 1: not a readable image"):
        images.decode([encode(np.zeros((9, 9), np.uint8)), broken], where=lambda i: f"row {i}")


def test_progress_ends_at_the_number_of_images(monkeypatch):
    monkeypatch.setattr(images, "REPORT_EVERY", 2)
    told = []
    images.decode(
        [encode(np.zeros((1, 1), np.uint8))] * 5, where=str, progress=lambda *now: told.append(now)
    )
    assert told == [("decoding images", done, 5) for done in (2, 4, 5)]


def test_no_images_are_an_empty_tensor():
    assert images.decode([], where=str).shape[0] == 0


def bomb(kind, side):
    """An image of some kilobytes that declares `side` x `side` pixels."""
    buffer = io.BytesIO()
    if kind == "PNG":  # the header alone: what follows it is never looked at
        image = Image.new("L", (8, 8))
        image.save(buffer, kind)
        raw = bytearray(buffer.getvalue())
        raw[16:24] = side.to_bytes(4, "big") * 2
        raw[29:33] = zlib.crc32(raw[12:29]).to_bytes(4, "big")
        return bytes(raw)
    Image.new("1", (side, side)).save(
        buffer, kind, **({"compression": "group4"} if kind == "TIFF" else {})
    )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "side"),
    [("PNG", 8193), ("PNG", 20_000), ("PNG", 2_000_000_000), ("TIFF", 9000), ("BMP", 8200)],
)
@pytest.mark.parametrize("size", [None, 32])
def test_an_image_that_declares_too_many_pixels_is_refused_before_it_is_decoded(
    kind, side, size, monkeypatch
):
    raw = bomb(kind, side)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    says = rf"photo 0: {side}x{side} are {side * side:,} pixels.*FEDPRESS_MAX_PIXELS={side * side}"
    with pytest.raises(DataError, match=says):
        images.decode([raw], where=lambda i: f"photo {i}", size=size)


def test_the_limit_of_pixels_can_be_raised_and_lowered(monkeypatch):
    buffer = io.BytesIO()
    Image.new("L", (30, 20)).save(buffer, "PNG")
    monkeypatch.setenv("FEDPRESS_MAX_PIXELS", "599")
    with pytest.raises(DataError, match=r"x: 30x20 are 600 pixels .* limit is 599"):
        images.decode([buffer.getvalue()], where=lambda i: "x")
    monkeypatch.setenv("FEDPRESS_MAX_PIXELS", "600")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 100
    )  # pillow's own would refuse twice that already at the header
    assert images.decode([buffer.getvalue()], where=lambda i: "x").shape == (1, 1, 20, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_that_is_a_program_is_none():
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="x: not a readable image"):
        images.decode([text], where=lambda i: "x")
