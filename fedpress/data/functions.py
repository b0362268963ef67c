"""Own data from a Python function: `package.module:function`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpress import tasks
from fedpress.core import own_modules
from fedpress.core.examples import Arrays
from fedpress.data.classes import checked, known_classes, rows_that_name
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import Examples, TargetRows
from fedpress.data.settings import DataSettings
from fedpress.data.targets import dealing_of_flags, dealing_of_numbers
from fedpress.errors import DataError, FedpressError, suggestion


def read(settings: DataSettings, seed: int) -> FederatedData | Examples:
    """Calls the function, with `path` and `seed` if it takes them, and checks what it returns.

    It returns a `FederatedData`, which is used as it is, or a dict of client name -> (x, y), which is shared out as
    the settings say. x is uint8 images [n, C, H, W] or numbers [n, ...]; y is class numbers from 0 up, or words [n];
    numbers [n] or [n, k] for a regression; truth values [n, k] for several labels.

    Raises:
        DataError: if there is no such function, it fails, or it returns something else.
    """
    where = f"source '{settings.source}'"
    function = _find(settings.source, where)
    known = {"path": settings.path, "seed": seed}
    try:
        taken = inspect.signature(function).parameters
        found = function(**{name: value for name, value in known.items() if name in taken})
    except FedpressError:
        raise
    except Exception as error:
        raise DataError(
            f"the function failed with {type(error).__name__}: {error}",
            place=where,
            cure="correct it",
        ) from error
    if isinstance(found, FederatedData):
        return found
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"returned {type(found).__name__}",
            place=where,
            cure="expected FederatedData or a dict client -> (x, y)",
        )
    return _examples(settings, {str(name): pair for name, pair in found.items()}, where)


def _find(source: str, where: str) -> Callable[..., Any]:
    name = source.partition(":")[2]
    try:
        module = own_modules.module_of(source)
    except ModuleNotFoundError as error:
        cure = "put its folder on PYTHONPATH, or its file beside the recipe"
        raise DataError(f"no module '{error.name}'", place=where, cure=cure) from error
    except FedpressError as error:
        raise DataError(error.problem, place=where, cure=error.cure) from error
    except Exception as error:
        raise DataError(
            f"importing it failed with {type(error).__name__}: {error}",
            place=where,
            cure="correct it",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise DataError(
            f"the module has no function '{name}'",
            place=where,
            cure=suggestion(name, dir(module)) or "name one that it has",
        )
    return function


def _examples(settings: DataSettings, pairs: dict[str, Any], where: str) -> Examples:
    clients = {name: _client(pair, f"{where}: client '{name}'") for name, pair in pairs.items()}
    shapes = {(*x.shape[1:], str(x.dtype)) for x, _ in clients.values()}
    if len(shapes) > 1:
        raise DataError(
            f"clients' examples differ: {' and '.join(map(str, sorted(shapes)))}",
            place=where,
            cure="make them alike",
        )
    try:
        labels = np.concatenate([y for _, y in clients.values()])
    except ValueError as error:
        raise DataError(
            "clients' targets differ in shape", place=where, cure="make them alike"
        ) from error
    owners = torch.cat([torch.full((len(x),), i) for i, (x, _) in enumerate(clients.values())])
    x = torch.cat([x for x, _ in clients.values()])
    # Whole numbers are classes, unless the recipe names a task of numbers, such as counts.
    named = settings.task is not None and tasks.find(tasks.kind_of(settings.task)).targets
    whole = labels.dtype.kind in "iu" and named == "numbers"
    if labels.dtype.kind == "f" or labels.ndim == 2 or whole:
        return _of_numbers(settings, Examples(settings.source, Arrays(x, torch.zeros(len(x))),
                                              owners=owners, owner_names=tuple(clients)), labels)  # fmt: skip
    y, words = _numbered(labels, where)
    train = Arrays(x, y)

    def targets(public: Tensor) -> TargetRows:
        if words:
            return known_classes(y, words, public, settings, where)
        # Class numbers: those up to the highest that is public, or as many as the recipe names.
        if settings.classes is not None:
            names = settings.classes
        else:
            count = int(y[rows_that_name(public, len(y), settings, where)].max()) + 1
            names = tuple(str(number) for number in range(count))
        return checked(
            TargetRows.of_classes(torch.where(y < len(names), y, -1), names), settings, where
        )

    return Examples(
        settings.source, train, owners=owners, owner_names=tuple(clients), targets=targets
    )


def _of_numbers(settings: DataSettings, rows: Examples, found: np.ndarray) -> Examples:
    """Makes examples whose targets are numbers [n] or [n, k], or 0 and 1 for each label [n, k] (truth values)."""
    given = (
        settings.task
        if settings.task is not None
        else ("multilabel" if found.dtype.kind == "b" else "regression")
    )
    kind = tasks.find(tasks.kind_of(given)).targets
    y = torch.from_numpy(found.astype(np.float32))
    width = 1 if y.dim() == 1 else y.shape[1]
    names = ("target",) if width == 1 else tuple(f"target {at}" for at in range(width))
    known = y.isfinite().reshape(len(y), -1).all(1)
    deal = dealing_of_flags if kind == "flags" else dealing_of_numbers
    return replace(
        rows,
        train=Arrays(rows.train.x, deal(y)),
        targets=lambda public: TargetRows(y, names, known),
        kind=kind,
    )


def _client(pair: Any, where: str) -> tuple[Tensor, np.ndarray]:
    try:
        x, y = (pair.x, pair.y) if isinstance(pair, Arrays) else pair
        x, y = torch.as_tensor(np.asarray(x)), np.asarray(y)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"expected a pair of arrays (x, y), got {type(pair).__name__}", place=where
        ) from error
    if x.dtype != torch.uint8:
        x = x.to(torch.float32)
    if (
        y.ndim not in (1, 2)
        or len(x) != len(y)
        or x.ndim < 2
        or (x.dtype == torch.uint8 and x.ndim != 4)
    ):
        raise DataError(
            f"x of shape {list(x.shape)} and y of shape {list(y.shape)}",
            place=where,
            cure="expected uint8 images [n, C, H, W] or numbers [n, d], and y [n] or [n, k]",
        )
    if len(y) == 0:
        raise DataError("no examples", place=where, cure="leave it out or give it some")
    return x, y


def _numbered(y: np.ndarray, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Returns int64 [n], and the words that they stand for; no words if the labels are class numbers."""
    if y.dtype.kind in "US":
        words, positions = np.unique(y, return_inverse=True)
        return torch.from_numpy(positions.astype(np.int64)), tuple(str(word) for word in words)
    if y.dtype.kind not in "iub" or y.min() < 0:
        kind = "negative numbers" if y.dtype.kind == "i" else str(y.dtype)
        raise DataError(
            f"labels of type {kind}", place=where, cure="expected whole numbers from 0 up, or words"
        )
    return torch.from_numpy(y.astype(np.int64)), ()
