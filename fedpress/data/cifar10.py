"""CIFAR-10 (Krizhevsky 2009): 60,000 images of 32x32 pixels, from parquet, the original archive, or a download."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fedpress.core.examples import Arrays
from fedpress.data import cache, cifar10_archive, cifar10_parquet
from fedpress.data.examples import Examples, Progress
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LAYOUTS = (cifar10_parquet, cifar10_archive)


def read(settings: DataSettings, progress: Progress | None) -> Examples:
    """Returns uint8 images [50000, 3, 32, 32] for training and 10,000 for testing.

    Rows are put in the order of their content, so that a seed means the same clients whatever the layout.

    Raises:
        DataError: if there is no data, or it is corrupt, or it cannot be downloaded.
    """
    layout, files = _locate(settings, progress)

    def decode() -> dict[str, np.ndarray]:
        raw = layout.read(files, progress)
        return {
            f"{part}_{key}": array
            for part in raw
            for key, array in zip("xy", _sorted(*raw[part]), strict=True)
        }

    arrays = {
        name: torch.from_numpy(array)
        for name, array in cache.decoded("cifar10", files, decode).items()
    }
    train, test = (Arrays(arrays[f"{part}_x"], arrays[f"{part}_y"]) for part in ("train", "test"))
    return Examples("cifar10", train, CLASSES, test=test)


def _locate(settings: DataSettings, progress: Progress | None) -> tuple[ModuleType, list[Path]]:
    """Returns which layout the data has, and its files."""
    path = settings.path
    if path is None:
        return cifar10_archive, cifar10_archive.fetch(
            cache.folder(), allowed=settings.download, progress=progress
        )
    if not path.exists():
        raise DataError(
            f"no such path '{path}'",
            place="source 'cifar10'",
            cure="check it, or leave it out to download",
        )
    for layout in LAYOUTS:
        if files := layout.find(path):
            return layout, files
    raise DataError(
        (
            f"neither train-*.parquet nor {cifar10_archive.ARCHIVE} nor "
            f"{cifar10_archive.FOLDER} in '{path}'"
        ),
        place="source 'cifar10'",
        cure="check the path, or leave it out to download",
    )


def _sorted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders images by a hash of their pixels and label."""
    keys = [
        blake2b(image.tobytes() + bytes([label]), digest_size=16).digest()
        for image, label in zip(x, y.tolist(), strict=True)
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return x[order], y[order]
