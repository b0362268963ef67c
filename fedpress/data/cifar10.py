"""CIFAR-10 (Krizhevsky 2009): 60,000 images of 32x32 pixels, from parquet, the original archive, or a download."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from fedpress.arrays import Arrays
from fedpress.data import cache, cifar10_parquet
from fedpress.data.examples import Examples, Progress
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read(settings: DataSettings, seed: int, progress: Progress | None) -> Examples:
    """Returns uint8 images [50000, 3, 32, 32] for training and 10,000 for testing.

    Rows are put in the order of their content, so that a seed means the same clients whatever the source.

    Raises:
        DataError: if there is no data, or it is corrupt, or it cannot be downloaded.
    """
    if settings.path is None:
        raise DataError("source 'cifar10': give path")
    files = cifar10_parquet.find(settings.path)
    if not files:
        raise DataError(f"source 'cifar10': no parquet in '{settings.path}'")

    def decode() -> dict[str, np.ndarray]:
        raw = cifar10_parquet.read(files, progress)
        return {f"{part}_{key}": array for part in raw for key, array in zip("xy", _sorted(*raw[part]), strict=True)}

    found = cache.decoded("cifar10", files, decode)
    train, test = (
        Arrays(torch.from_numpy(found[f"{part}_x"]), torch.from_numpy(found[f"{part}_y"])) for part in ("train", "test")
    )
    return Examples("cifar10", train, CLASSES, test=test)


def _sorted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders images by a hash of their pixels and label."""
    keys = [
        blake2b(image.tobytes() + bytes([label]), digest_size=16).digest()
        for image, label in zip(x, y.tolist(), strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return x[order], y[order]
