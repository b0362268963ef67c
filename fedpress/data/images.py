"""Encoded images (PNG, WebP, JPEG ...) to one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedpress.data.examples import Progress
from fedpress.errors import DataError

T = TypeVar("T")
CHUNK = 512


def decode(
    blobs: Sequence[bytes | None],
    *,
    where: Callable[[int], str],
    size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Decodes images to uint8 [n, C, H, W] on two threads; C is 1 if the first image is grey, else 3.

    Args:
        blobs: the bytes of each file.
        where: names image `i` in an error.
        size: height and width to resize to; None: all must be of one size.
        progress: told how many are decoded.

    Raises:
        DataError: if an image cannot be read, or differs in size.
    """
    if not blobs:
        return torch.zeros(0, 3, size or 1, size or 1, dtype=torch.uint8)
    first = _decode_one(blobs[0], where(0), None, size)
    mode = "L" if first.ndim == 2 else "RGB"
    out = np.empty((len(blobs), *first.shape), dtype=np.uint8)

    def work(start: int) -> int:
        stop = min(start + CHUNK, len(blobs))
        for i in range(start, stop):
            image = _decode_one(blobs[i], where(i), mode, size)
            if image.shape != first.shape:
                raise DataError(
                    f"{where(i)}: an image of {image.shape[0]}x{image.shape[1]} pixels where the first has "
                    f"{first.shape[0]}x{first.shape[1]}; set image_size to resize them all"
                )
            out[i] = image
        return stop

    with ThreadPoolExecutor(2) as pool:
        for done in _in_order(pool, work, range(0, len(blobs), CHUNK)):
            if progress:
                progress("decoding images", done, len(blobs))
    channels_last = torch.from_numpy(out if out.ndim == 4 else out[..., None])
    return channels_last.permute(0, 3, 1, 2).contiguous()


def _in_order(pool: ThreadPoolExecutor, work: Callable[[int], T], items: Iterable[int]) -> Iterable[T]:
    futures = [pool.submit(work, item) for item in items]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _decode_one(blob: bytes | None, where: str, mode: str | None, size: int | None) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(blob or b"")) as image:
            wanted = mode or ("L" if image.mode in ("L", "1", "I;16", "LA") else "RGB")
            image = image.convert(wanted)
            if size is not None and image.size != (size, size):
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable image ({error}); replace or remove it") from error
