"""CIFAR-10 in the layout of the hub: `train-*.parquet` and `test-*.parquet` with `img.bytes` and `label`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedpress.data import images
from fedpress.data.examples import Progress
from fedpress.data.tables import read_parquet
from fedpress.errors import DataError


def find(path: Path) -> list[Path]:
    """Returns the parquet files in `path` or in the usual folders below it; an empty list if there are none.

    Raises:
        DataError: if one of several numbered files is missing.
    """
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
    names = {file.name for file in files}
    for part in ("train", "test"):
        count = next(
            (
                name.split("-of-")[1].split(".")[0]
                for name in sorted(names)
                if name.startswith(part) and "-of-" in name
            ),
            None,
        )
        wanted = (
            [f"{part}-{i:05d}-of-{count}.parquet" for i in range(int(count))]
            if count and count.isdigit()
            else []
        )
        missing = [name for name in wanted if name not in names]
        if missing or not any(name.startswith(part) for name in names):
            name = missing[0] if missing else f"{part}-*.parquet"
            raise DataError(
                f"'{folder / name}' is missing",
                place="source 'cifar10'",
                cure="copy the whole folder again",
            )


def read(files: list[Path], progress: Progress | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns `train` and `test`: uint8 images [n, 3, 32, 32] and int64 labels [n].

    Raises:
        DataError: if a file or an image in it is corrupt.
    """
    parts = {}
    for part in ("train", "test"):
        read_files = [_read_file(file, progress) for file in files if file.name.startswith(part)]
        parts[part] = (
            np.concatenate([x for x, _ in read_files]),
            np.concatenate([y for _, y in read_files]),
        )
    return parts


def _read_file(file: Path, progress: Progress | None) -> tuple[np.ndarray, np.ndarray]:
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
