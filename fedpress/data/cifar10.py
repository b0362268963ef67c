"""CIFAR-10 (Krizhevsky 2009): 60,000 images of 32x32 pixels, from a folder or by download."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from fedpress.core.examples import Arrays
from fedpress.data import cache, cifar10_archive, cifar10_parquet
from fedpress.data.examples import Progress, SourceRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

# Names of the classes, in the order of their numbers.
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The data set is published in two file layouts. Each module finds and reads the files of one.
LAYOUTS = (cifar10_parquet, cifar10_archive)


def read_cifar10(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns uint8 images [50000, 3, 32, 32] for training and 10,000 for testing.

    Rows are sorted by their content, so that a seed gives the same clients for both file layouts.

    Raises:
        DataError: if the data is missing or corrupt, or cannot be downloaded.
    """
    layout, files = _locate(settings, progress)

    def decode() -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for part, (x, y) in layout.read(files, progress).items():
            found[f"{part}_x"], found[f"{part}_y"] = _sorted(x, y)
        return found

    # Decoding takes much longer than reading the arrays again.
    arrays = cache.decoded("cifar10", files, decode)
    parts = {}
    for part in ("train", "test"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        parts[part] = Arrays(torch.from_numpy(x), torch.from_numpy(y))
    return SourceRows("cifar10", parts["train"], CLASSES, test=parts["test"])


def _locate(settings: DataSettings, progress: Progress | None) -> tuple[ModuleType, list[Path]]:
    """Returns the module that reads the layout of the data, and its files."""
    path = settings.path
    if path is None:
        files = cifar10_archive.fetch(cache.folder(), allowed=settings.download, progress=progress)
        return cifar10_archive, files
    if not path.exists():
        raise DataError(
            f"no such path '{path}'",
            place="source 'cifar10'",
            cure="check the path, or leave it out to download",
        )
    for layout in LAYOUTS:
        files = layout.find(path)
        if files:
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
    """Sorts images by a hash of their pixels and label."""
    keys = []
    for image, label in zip(x, y.tolist(), strict=True):
        content = image.tobytes() + bytes([label])
        # Sorted by a hash: sorting by pixels would put all dark images first.
        keys.append(blake2b(content, digest_size=16).digest())
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    return x[order], y[order]
