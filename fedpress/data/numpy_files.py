"""Reads arrays from .npz files, or from a folder of .npy files: inputs, targets and clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch

from fedpress.data.examples import Progress, SourceRows
from fedpress.data.functions import rows_of_clients
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError, first_line

PAIRS = (
    ("x", "y"),
    ("X", "y"),
    ("x_train", "y_train"),
    ("train_images", "train_labels"),
    ("images", "labels"),
)
"""Usual names of the arrays of inputs and targets; the first pair that is there is taken."""
CLIENT = "client"
"""Usual name of the array that names the client of each example."""


def read_numpy(settings: DataSettings, progress: Progress | None) -> SourceRows:
    """Returns the examples of arrays; if there are arrays for testing, they are the test set.

    Raises:
        DataError: if a file is missing or corrupt, an array is missing, or lengths differ.
    """
    path = settings.path
    assert path is not None, "checked by DataSettings"
    where = f"'{path}'"
    files = sorted(path.glob("*.npz")) if path.is_dir() else []
    if not files:
        return replace(_of_arrays(_load(path), settings, where), name=path.stem)
    pairs = {}
    for file in files:
        own = _load(file)
        pairs[file.stem] = _pair(own, *_names(own, settings, f"'{file}'"))
    return replace(rows_of_clients(settings, pairs, where), name=path.name)


def _of_arrays(arrays: dict[str, np.ndarray], settings: DataSettings, where: str) -> SourceRows:
    """Returns the examples of one set of arrays."""
    names = _names(arrays, settings, where)
    x, y = _pair(arrays, *names)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise DataError(
            f"'{names[0]}' has the shape {list(x.shape)}, but '{names[1]}' {list(y.shape)}",
            place=where,
            cure="give one target for each example",
        )
    clients = _clients(arrays, settings, len(y), where)
    pairs = {"": (x, y)}
    if clients is not None:
        pairs = {str(name): (x[clients == name], y[clients == name]) for name in np.unique(clients)}
    owner_names = tuple(pairs)
    test = names[0].replace("train", "test"), names[1].replace("train", "test")
    has_test = test != names and {*test} <= arrays.keys()
    if has_test:
        pairs["test set"] = _pair(arrays, *test)
    found = rows_of_clients(settings, pairs, where)
    if has_test:
        assert found.owners is not None, "rows of clients have owners"
        is_test = found.owners == len(owner_names)
        # A row for testing has no client; it is taken out before clients are looked at.
        owners = torch.where(is_test, 0, found.owners)
        found = replace(found, owners=owners, owner_names=owner_names, is_test=is_test)
    return found if clients is not None else replace(found, owners=None, owner_names=())


def _load(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a .npz file, or of the .npy files in a folder, by their names."""
    if path.is_dir():
        files = sorted(path.glob("*.npy"))
        if not files:
            raise DataError(
                f"no .npz or .npy file in '{path}'",
                place="source 'numpy'",
                cure="check the path",
            )
        return {file.stem: _array(file) for file in files}
    if not path.is_file():
        raise DataError(f"no such path '{path}'", place="source 'numpy'", cure="check the path")
    if path.suffix == ".npy":
        raise DataError(
            "a .npy file has one array, but inputs and targets are needed",
            place=f"'{path}'",
            cure="put x.npy and y.npy into a folder, and give the folder",
        )
    try:
        # Opened here, because numpy does not close a damaged file.
        with path.open("rb") as opened:
            if opened.read(2) != b"PK":
                raise ValueError("it is no .npz archive")
            opened.seek(0)
            # No pickles: loading one can run any code.
            with np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise _unreadable(path, error) from error


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise _unreadable(path, error) from error
    return array


def _unreadable(path: Path, error: Exception) -> DataError:
    if "allow_pickle" in str(error):
        return DataError(
            "it holds Python objects, which are not loaded because they can run code",
            place=f"'{path}'",
            cure="save arrays of numbers or of words, with a dtype other than object",
        )
    return DataError(
        f"not a readable file of numpy ({first_line(error)})",
        place=f"'{path}'",
        cure="save it anew",
    )


def _names(arrays: dict[str, np.ndarray], settings: DataSettings, where: str) -> tuple[str, str]:
    """Returns the names of the arrays of inputs and targets."""
    x, y = next((pair for pair in PAIRS if {*pair} <= arrays.keys()), PAIRS[0])
    if settings.feature_columns is not None:
        if len(settings.feature_columns) != 1:
            raise DataError(
                f"names {len(settings.feature_columns)} arrays",
                place="feature_columns",
                cure="name the one array of inputs",
            )
        x = settings.feature_columns[0]
    if "label_column" in settings.model_fields_set:
        y = settings.label_columns[0]
    _require(arrays, x, "feature_columns", where)
    _require(arrays, y, "label_column", where)
    return x, y


def _require(arrays: dict[str, np.ndarray], name: str, key: str, where: str) -> None:
    if name not in arrays:
        raise DataError(
            f"no array '{name}' in {where} (it has {', '.join(arrays) or 'none'})",
            place=key,
            cure=f'name the array with {key} = "NAME"'
            if key != "feature_columns"
            else f'name the array with {key} = ["NAME"]',
        )


def _clients(
    arrays: dict[str, np.ndarray], settings: DataSettings, count: int, where: str
) -> np.ndarray | None:
    """Returns the client of each example; None if no array names it."""
    name = settings.client_column or (CLIENT if CLIENT in arrays else None)
    if name is None:
        return None
    _require(arrays, name, "client_column", where)
    clients = arrays[name]
    if clients.shape != (count,):
        raise DataError(
            f"'{name}' has the shape {list(clients.shape)}, but there are {count} examples",
            place="client_column",
            cure="give one client for each example",
        )
    return clients


def _pair(arrays: dict[str, np.ndarray], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets in the layout of fedpress: channels first, labels flat."""
    images, labels = arrays[x], arrays[y]
    if images.dtype == np.uint8 and images.ndim == 3:
        images = images[:, None]
    # Most programs store colours last.
    if images.dtype == np.uint8 and images.ndim == 4 and _colours_last(images.shape):
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    return images, labels


def _colours_last(shape: Sequence[int]) -> bool:
    return shape[3] in (1, 3) and shape[1] not in (1, 3)
