"""Reads CIFAR-10 from the parquet files of the Hugging Face hub, such as `train-*.parquet`.

The columns are `img` (a struct with `bytes`) and `label`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpress.data.examples import Progress
from fedpress.errors import DataError


def find(path: Path) -> list[Path]:
    """Returns the parquet files in `path` or in the usual folders below it; else an empty list.

    Raises:
        DataError: if there are only train files or only test files, or if one of several numbered
            files is missing.
    """
    # Folders in which copies of the hub's repository keep the files.
    for folder in (
        path,
        path / "plain_text",
        path / "data",
        path / "cifar10",
        path / "cifar10" / "plain_text",
    ):
        files = sorted([*folder.glob("train-*.parquet"), *folder.glob("test-*.parquet")])
        if files:
            _check_complete(folder, files)
            return files
    return []


def _check_complete(folder: Path, files: list[Path]) -> None:
    # A copy may have stopped halfway; without this check the run would train on part of the data.
    names = sorted(file.name for file in files)
    for part in ("train", "test"):
        own = [name for name in names if name.startswith(part)]
        missing = _missing_shards(part, own) if own else [f"{part}-*.parquet"]
        if missing:
            raise DataError(
                f"'{folder / missing[0]}' is missing",
                place="source 'cifar10'",
                cure="copy the whole folder again",
            )


def _missing_shards(part: str, names: list[str]) -> list[str]:
    """Returns the files that are missing, from names such as `train-00000-of-00002.parquet`."""
    for name in names:
        if "-of-" not in name:
            continue
        count = name.split("-of-")[1].split(".")[0]
        # In older copies a hash follows, as in `train-00000-of-00002-0a1b.parquet`. The hashes in
        # the names of the other files are not known, so they are not checked.
        if not count.isdigit():
            return []
        wanted = [f"{part}-{i:05d}-of-{count}.parquet" for i in range(int(count))]
        return [shard for shard in wanted if shard not in names]
    return []


def read(files: list[Path], progress: Progress | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns `train` and `test`: uint8 images [n, 3, 32, 32] and int64 labels [n].

    Raises:
        DataError: if a file or an image in it is corrupt, or is not from CIFAR-10.
    """
    parts = {}
    for part in ("train", "test"):
        own = [_read_file(file, progress) for file in files if file.name.startswith(part)]
        x = np.concatenate([x for x, _ in own])
        y = np.concatenate([y for _, y in own])
        parts[part] = x, y
    return parts


def _read_file(file: Path, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
    # Imported here, because pyarrow is slow to import, and other sources need neither it nor pillow.
    from fedpress.data import images
    from fedpress.data.tables import read_parquet

    table = read_parquet(file)
    for column in ("img", "label"):
        if column not in table.column_names:
            raise DataError(
                f"no column '{column}' (it has {', '.join(table.column_names)})",
                place=f"'{file}'",
                cure="is this CIFAR-10?",
            )
    blobs = [image["bytes"] for image in table["img"].to_pylist()]
    x = images.decode(blobs, where=lambda i: f"'{file}' row {i}", progress=progress).numpy()
    y = table["label"].to_numpy().astype(np.int64)
    if x.shape[1:] != (3, 32, 32) or not ((y >= 0) & (y < 10)).all():
        raise DataError(
            f"images of {x.shape[1:]} with labels {y.min()} to {y.max()}",
            place=f"'{file}'",
            cure="is this CIFAR-10?",
        )
    return x, y
