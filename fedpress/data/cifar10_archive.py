"""Reads CIFAR-10 from the pickle files of its author, without running code in these files."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedpress.data import download
from fedpress.data.examples import Progress
from fedpress.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
# The author publishes this checksum. It serves to find damaged files. MD5 does not stop attackers,
# but the pickles are read without running code in them.
MD5 = "c58f30108f718f92721af3bbe74f3473"
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
BATCH_NAMES = (*BATCHES["train"], *BATCHES["test"])


def find(path: Path) -> list[Path]:
    """Returns the archive, or the six files unpacked from it, in `path` or a usual folder below it.

    Returns:
        The paths; only `path` if it is a file; an empty list if nothing is found.

    Raises:
        DataError: if some `data_batch` files are unpacked, but one of the six files is missing.
    """
    if path.is_file():
        return [path]
    # The places where copies of the data set usually are.
    for folder in (path, path / FOLDER, path / "cifar10", path / "cifar10" / FOLDER):
        if any(folder.glob("data_batch_*")):
            return _batch_files(folder)
        if (folder / ARCHIVE).is_file():
            return [folder / ARCHIVE]
    return []


def _batch_files(folder: Path) -> list[Path]:
    files = [folder / name for name in BATCH_NAMES]
    for file in files:
        if not file.is_file():
            raise DataError(
                f"'{file}' is missing",
                place="source 'cifar10'",
                cure=f"unpack {ARCHIVE} again",
            )
    return files


def fetch(folder: Path, *, allowed: bool, progress: Progress | None) -> list[Path]:
    """Returns the archive in `folder`, downloading it first if it is not there.

    Raises:
        DataError: if the archive is not there, and the download is off or fails.
    """
    target = folder / ARCHIVE
    if not target.exists():
        if not allowed:
            raise DataError(
                "no path is given and download is off",
                place="source 'cifar10'",
                cure=f"set path, or put {URL} in '{folder}'",
            )
        download.fetch(URL, target, md5=MD5, progress=progress)
    return [target]


def read(files: list[Path], progress: Progress | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns `train` and `test`: uint8 images [n, 3, 32, 32] and int64 labels [n].

    Raises:
        DataError: if a file is corrupt, or the archive is not the published one.
    """
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for where, name, content in _members(files):
        batches[name] = read_batch(content, where)
        if progress:
            progress("reading CIFAR-10", len(batches), 6)
    missing = [name for name in BATCH_NAMES if name not in batches]
    if missing:
        raise DataError(
            f"holds no {missing[0]}", place=f"'{files[0]}'", cure=f"download {URL} again"
        )
    parts = {}
    for part, names in BATCHES.items():
        x = np.concatenate([batches[name][0] for name in names])
        y = np.concatenate([batches[name][1] for name in names])
        parts[part] = x, y
    return parts


def _members(files: list[Path]) -> Iterator[tuple[str, str, bytes]]:
    """Yields place (for errors), name and content of each batch."""
    if len(files) > 1:
        for file in files:
            yield f"'{file}'", file.name, file.read_bytes()
        return
    got = download.md5_of(files[0])
    if got != MD5:
        raise DataError(
            f"md5 {got}, expected {MD5}",
            place=f"'{files[0]}'",
            cure=f"delete it and download {URL} again",
        )
    try:
        with tarfile.open(files[0], "r:gz") as archive:
            # Read in place, never unpacked: names in an archive may point anywhere.
            for member in archive:
                name = Path(member.name).name
                content = archive.extractfile(member) if name in BATCH_NAMES else None
                if content:
                    yield f"'{files[0]}' member {member.name}", name, content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"not a readable archive ({error})", place=f"'{files[0]}'", cure=f"download {URL} again"
        ) from error


def read_batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images uint8 [n, 3, 32, 32] and labels int64 [n] of one pickled batch.

    Args:
        content: the bytes of the pickle file.
        where: name of the batch in errors.

    Raises:
        DataError: if the content is not a batch of CIFAR-10.
    """
    try:
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        # A row of the file has all red values, then all green, then all blue;
        # the values of a colour are ordered row by row.
        pixels = batch[b"data"].pixels().reshape(-1, 3, 32, 32)
        labels = np.array(batch[b"labels"], dtype=np.int64)
        if len(labels) != len(pixels):
            raise ValueError(f"{len(pixels)} images but {len(labels)} labels")
        if not ((labels >= 0) & (labels < 10)).all():
            raise ValueError("a label is not in 0 to 9")
    # A damaged pickle may raise anything.
    except Exception as error:
        raise DataError(
            f"not a batch of CIFAR-10 ({error})", place=where, cure=f"download {URL} again"
        ) from error
    return pixels, labels


class _Array:
    """Takes the place of numpy's array class while the pickle is read; accepts only uint8 data."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """Returns the uint8 array."""
        _, shape, dtype, fortran, data = self.state
        if dtype.name not in (b"u1", "u1") or fortran:
            raise ValueError(f"expected a uint8 array in C order, got {dtype.name!r}")
        return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()


class _Dtype:
    """Takes the place of numpy's dtype class while the pickle is read; keeps only the name."""

    def __init__(self, name: object = "", *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """Takes the place of `codecs.encode`, which some pickles (protocol 2) call to make bytes."""
    return text.encode("latin1")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles only lists, dictionaries, numbers, bytes and uint8 arrays.

    A plain unpickler would call any Python function that the file names.
    """

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _Array
        admitted = {
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): _latin1,
        }
        # Everything else is refused: a pickle can name any function, such as `os.system`.
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which is not needed to read data"
            )
        return admitted[module, name]
