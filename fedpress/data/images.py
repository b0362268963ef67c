"""Decodes image files (PNG, WebP, JPEG and others) to one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedpress.core import limits
from fedpress.data.examples import InputRows, Progress
from fedpress.data.preparation import Preparation
from fedpress.data.preparation_parts import ImagePart
from fedpress.errors import DataError

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "TIFF",
    "PPM",
    "JPEG2000",
    "ICO",
    "TGA",
)
"""Formats that pillow decodes itself; for some others, such as EPS, it would start a program."""
# Modes of pillow without colours.
GREY = ("1", "L", "LA", "I;16")
# Number of images between two calls of `progress`.
REPORT_EVERY = 500


def decode(
    images: Sequence[bytes | Path | None],
    *,
    where: Callable[[int], str],
    size: int | None = None,
    like: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Decodes images to uint8 [n, C, H, W]; C is 1 if the image at `like` is grey, else 3.

    Only one thread is used. Two threads were measured and were not faster, because pillow holds
    Python's global lock.

    Args:
        images: the content or the path of each file; None counts as an unreadable file.
        where: function that maps the position of an image to its name in errors.
        size: height and width of the result; None: images are not resized and must have the same
            size.
        like: position of the image that decides the number of channels and the size. The image
            should be public, because everybody sees the input shape of the model.
        progress: called with the number of decoded images.

    Raises:
        DataError: if an image cannot be read, has another size, or declares more pixels than
            `core.limits` allow.
    """
    if not images:
        return torch.zeros(0, 3, size or 1, size or 1, dtype=torch.uint8)
    first = _decode_one(images[like], where(like), None, size)
    other = "the first" if like == 0 else where(like)
    mode = "L" if first.ndim == 2 else "RGB"
    out = np.empty((len(images), *first.shape), dtype=np.uint8)
    for i, image in enumerate(images):
        pixels = _decode_one(image, where(i), mode, size)
        if pixels.shape != first.shape:
            raise DataError(
                (
                    f"an image of {pixels.shape[0]}x{pixels.shape[1]} pixels, but {other} has "
                    f"{first.shape[0]}x{first.shape[1]}"
                ),
                place=f"{where(i)}",
                cure="set image_size to resize them all",
            )
        out[i] = pixels
        if progress and ((i + 1) % REPORT_EVERY == 0 or i + 1 == len(images)):
            progress("decoding images", i + 1, len(images))
    if out.ndim == 3:
        out = out[..., None]
    channels_last = torch.from_numpy(out)
    return channels_last.permute(0, 3, 1, 2).contiguous()


def prepared(x: Tensor, *, resized: bool) -> InputRows:
    """Returns decoded images [n, C, H, W] as inputs, with the preparation of further ones.

    Args:
        x: the result of `decode`.
        resized: whether they were resized.
    """
    channels, height, width = x.shape[1:]
    part = ImagePart(channels, height, width, resized)
    return InputRows(x, torch.zeros(len(x), dtype=torch.bool), Preparation((), part=part))


def decode_as(images: Sequence[Path], part: ImagePart, where: Callable[[int], str]) -> Tensor:
    """Decodes images as those of the training were, to uint8 [n, C, H, W].

    Args:
        images: the files.
        part: channels and size.
        where: function that maps the position of an image to its name in errors.

    Raises:
        DataError: if an image cannot be read, or has another size and is not resized.
    """
    size = part.height if part.resized else None
    mode = "L" if part.channels_of_image == 1 else "RGB"
    out = np.empty((len(images), part.height, part.width, part.channels_of_image), dtype=np.uint8)
    for at, image in enumerate(images):
        pixels = _decode_one(image, where(at), mode, size)
        if pixels.shape[:2] != (part.height, part.width):
            raise DataError(
                f"an image of {pixels.shape[0]}x{pixels.shape[1]} pixels, but the model takes "
                f"{part.height}x{part.width}",
                place=where(at),
                cure="resize it, or train with image_size, which resizes all images",
            )
        out[at] = pixels.reshape(out.shape[1:])
    return torch.from_numpy(out).permute(0, 3, 1, 2).contiguous()


def _decode_one(
    source: bytes | Path | None, where: str, mode: str | None, size: int | None
) -> np.ndarray:
    try:
        with _opened(source) as image:
            # The header is checked before decoding, because an image of some kilobytes may
            # need gigabytes of memory.
            excess = limits.above("pixels", image.width * image.height)
            if excess:
                raise DataError(
                    f"{image.width}x{image.height} are {excess.problem}",
                    place=where,
                    cure=f"{excess.cure}, or make the image smaller",
                )
            own_mode = "L" if image.mode in GREY else "RGB"
            pixels = image.convert(mode or own_mode)
        if size is not None and pixels.size != (size, size):
            pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(pixels)
    # Pillow raises SyntaxError for a broken PNG. Pillow's messages are not shown: they contain the
    # path, and a folder in the path may be a private label.
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(
            f"not a readable image ({type(error).__name__})",
            place=where,
            cure="replace or remove it",
        ) from error


def _opened(source: bytes | Path | None) -> Image.Image:
    """Opens an image and reads its header; the pixels are not decoded yet."""
    file = source if isinstance(source, Path) else io.BytesIO(source or b"")
    # Pillow's own pixel limit is switched off here, because the user may have set ours higher.
    theirs = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        return Image.open(file, formats=_formats())
    finally:
        Image.MAX_IMAGE_PIXELS = theirs


@cache
def _formats() -> tuple[str, ...]:
    """Returns the entries of `FORMATS` that the installed pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
