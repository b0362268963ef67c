"""Gets data by calling the user's function that `source = "package.module:function"` names."""

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
from fedpress.core.inputs import Inputs, NamedInputs, inputs_text, join, shape_text, signature_of
from fedpress.data.classes import number_classes, rows_that_define_classes, with_other_class
from fedpress.data.dataset import FederatedData
from fedpress.data.examples import SourceRows, TargetRows
from fedpress.data.partition_labels import (
    partition_labels_of_flags,
    partition_labels_of_numbers,
)
from fedpress.data.settings import DataSettings
from fedpress.data.torch_datasets import as_pair, is_dataset
from fedpress.errors import DataError, FedpressError, ModelError
from fedpress.tasks.base import IGNORED


def call_function(settings: DataSettings, seed: int) -> FederatedData | SourceRows:
    """Calls the user's function (with `path` and `seed` if it takes them) and checks its result.

    The function may return a `FederatedData`, which is used unchanged. Or it returns a dictionary
    from client name to a pair (x, y) or a torch Dataset of such pairs, whose rows are then split as
    the settings say. A Dataset alone has rows without clients. Of a pair:

    - x is uint8 images [n, C, H, W], or numbers [n, ...], or a dictionary of such arrays by the
      names of forward's arguments. Numbers become float32, but in a dictionary integers (token
      ids, lengths) become int64, and booleans stay booleans.
    - y is class numbers from 0 up or words [n]; numbers [n] or [n, k] for a regression; booleans
      [n, k] for several labels. If the recipe names a task of classes, such as "classification",
      "language" or "segmentation", y may also be class numbers [n, ...], one for each position,
      with -100 for positions that do not count. A task of the user with `targets = "arrays"` takes
      numbers [n, ...] of any shape.

    Raises:
        DataError: if the function is missing, fails, or returns something else.
    """
    where = f"source '{settings.source}'"
    function = _find(settings.source, where)
    known = {"path": settings.path, "seed": seed}
    try:
        # The function may take one of these arguments, both or neither.
        taken = inspect.signature(function).parameters
        arguments = {name: value for name, value in known.items() if name in taken}
        found = function(**arguments)
    # Errors of fedpress have a place and a cure already.
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
    if is_dataset(found):
        rows = rows_of_clients(settings, {"": found}, where)
        return replace(rows, owners=None, owner_names=())
    if not isinstance(found, Mapping) or not found:
        raise DataError(
            f"returned {type(found).__name__}",
            place=where,
            cure="expected FederatedData, a dict client -> (x, y), or a torch Dataset",
        )
    return rows_of_clients(settings, {str(name): pair for name, pair in found.items()}, where)


def _find(source: str, where: str) -> Callable[..., Any]:
    try:
        function: object = own_modules.object_of(source)
    except ModelError as error:
        raise DataError(error.problem, place=where, cure=error.cure) from error
    if not callable(function):
        raise DataError(
            f"'{source.partition(':')[2]}' is {type(function).__name__}, expected a function",
            place=where,
            cure="name one that returns the data",
        )
    return function


def rows_of_clients(settings: DataSettings, pairs: dict[str, Any], where: str) -> SourceRows:
    """Returns the rows of clients whose data are in memory.

    Args:
        settings: the `[data]` table of the recipe.
        pairs: name of each client -> its pair (x, y) or torch Dataset; a single name "" means that
            the data names no clients.
        where: name of the data in errors.

    Raises:
        DataError: if the data of a client has another form, or clients' shapes differ.
    """
    clients = {}
    for name, pair in pairs.items():
        clients[name] = _client(pair, f"{where}: client '{name}'" if name else where)
    x, labels = _concatenate(clients, where)
    # The client of every row is stored, so that `partition = "natural"` can assign the row to the
    # same client.
    sizes = torch.tensor([len(x) for x, _ in clients.values()])
    owners = torch.arange(len(clients)).repeat_interleave(sizes)
    # Integers are classes, unless the recipe names a task that predicts numbers, such as "poisson".
    named = None
    if settings.task is not None:
        named = tasks.find(tasks.kind_of(settings.task)).targets
    whole = labels.dtype.kind in "iu" and named == "numbers"
    rows = SourceRows(
        settings.source,
        Arrays(x, torch.zeros(len(x))),
        owners=owners,
        owner_names=tuple(clients),
    )
    if labels.dtype.kind in "iu" and labels.ndim > 1 and named == "classes":
        return _of_positions(settings, rows, torch.from_numpy(labels.astype(np.int64)), where)
    if labels.dtype.kind == "f" or labels.ndim > 1 or whole or named == "arrays":
        return _of_numbers(settings, rows, labels, where)
    return _of_classes(settings, rows, labels, where)


def _concatenate(
    clients: Mapping[str, tuple[Inputs, np.ndarray]], where: str
) -> tuple[Inputs, np.ndarray]:
    """Returns the inputs and targets of all clients, which must have the same shapes and types."""
    forms = {signature_of(x): inputs_text(x) for x, _ in clients.values()}
    if len(forms) > 1:
        raise DataError(
            f"clients' examples differ: {' and '.join(sorted(forms.values()))}",
            place=where,
            cure="give all clients examples of the same shape and type",
        )
    try:
        labels = np.concatenate([y for _, y in clients.values()])
    except ValueError as error:
        raise DataError(
            "clients' targets differ in shape", place=where, cure="give all targets the same shape"
        ) from error
    return join([x for x, _ in clients.values()]), labels


def _of_classes(
    settings: DataSettings, rows: SourceRows, labels: np.ndarray, where: str
) -> SourceRows:
    """Returns rows whose targets are words or class numbers [n]."""
    y, words = _numbered(labels, where)

    def targets(public: Tensor) -> TargetRows:
        if words:
            return number_classes(y, words, public, settings, where)
        names = _names_of_numbers(y, public, settings, where)
        # A private row may have a higher number than all public rows.
        known = torch.where(y < len(names), y, -1)
        return with_other_class(TargetRows.of_classes(known, names), settings, where)

    return replace(rows, train=Arrays(rows.train.x, y), targets=targets)


def _names_of_numbers(
    y: Tensor, public: Tensor, settings: DataSettings, where: str
) -> tuple[str, ...]:
    """Returns the class names of the recipe, or else all numbers up to the largest public label."""
    if settings.classes is not None:
        return settings.classes
    rows = rows_that_define_classes(public, len(y), settings, where)
    count = int(y[rows].max()) + 1
    return tuple(str(number) for number in range(count))


def _of_positions(settings: DataSettings, rows: SourceRows, y: Tensor, where: str) -> SourceRows:
    """Returns rows with a class number for each position, such as a pixel or token: y [n, ...].

    Partitioners, which divide rows among clients, need one label for each row. It is the most
    frequent class of the row.
    """
    counted = y != IGNORED
    if bool((y[counted] < 0).any()):
        raise DataError(
            "some labels are negative numbers",
            place=where,
            cure=f"expected class numbers from 0 up, and {IGNORED} for positions without a class",
        )
    if not bool(counted.any()):
        raise DataError(
            f"all labels are {IGNORED}, which is no class",
            place=where,
            cure="give some positions class numbers from 0 up",
        )
    most = int(y.max()) + 1
    votes = torch.stack([(y == label).flatten(1).sum(1) for label in range(most)], 1)

    def targets(public: Tensor) -> TargetRows:
        names = _names_of_numbers(y, public, settings, where)
        return TargetRows(y, names, (y < len(names)).flatten(1).all(1))

    return replace(rows, train=Arrays(rows.train.x, votes.argmax(1)), targets=targets)


def _of_numbers(
    settings: DataSettings, rows: SourceRows, found: np.ndarray, where: str
) -> SourceRows:
    """Returns rows whose targets are numbers [n] or [n, k], or booleans [n, k] for k labels."""
    task = settings.task
    if task is None:
        refuse_one_hot(found, where)
        task = "multilabel" if found.dtype.kind == "b" else "regression"
    kind = tasks.find(tasks.kind_of(task)).targets
    if found.ndim > 2 and kind != "arrays":
        raise DataError(
            f"targets of shape {list(found.shape)}",
            place=where,
            cure=(
                "expected [n] or [n, k]; class numbers of positions need "
                "data.task = 'classification', arrays a task of your own (docs/tasks.md)"
            ),
        )
    y = torch.from_numpy(found.astype(np.float32))
    names: tuple[str, ...] = ("target",)
    if y.dim() == 2 and y.shape[1] != 1 and kind != "arrays":
        names = tuple(f"target {at}" for at in range(y.shape[1]))
    # NaN marks a row without a target; such rows are dropped.
    known = y.isfinite().reshape(len(y), -1).all(1)
    if kind == "flags":
        labels = partition_labels_of_flags(y)
    else:
        labels = partition_labels_of_numbers(y.flatten(1) if y.dim() > 2 else y)
    return replace(
        rows,
        train=Arrays(rows.train.x, labels),
        targets=lambda public: TargetRows(y, names, known),
        kind=kind,
    )


def refuse_one_hot(targets: np.ndarray, where: str) -> None:
    """Refuses floats [n, k] that are most likely classes, which a regression would predict.

    Raises:
        DataError: if each row of at least two has a single 1, and 0 elsewhere.
    """
    if targets.dtype.kind != "f" or targets.ndim != 2 or targets.shape[1] < 2 or len(targets) < 2:
        return
    if ((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all():
        raise DataError(
            "the targets look like classes in one-hot form",
            place=where,
            cure="give class numbers, y.argmax(1); or name the task, such as task = 'regression'",
        )


def _client(pair: Any, where: str) -> tuple[Inputs, np.ndarray]:
    """Checks the pair (x, y) of one client, and converts x to the types of fedpress."""
    x, y = _arrays(pair, where)
    if isinstance(x, Mapping):
        shape = shape_text({name: tuple(t.shape) for name, t in x.items()})
        fits = True
        x = _named(x, where)
    else:
        shape = str(list(x.shape))
        # uint8 can only be images [n, C, H, W]; other numbers are features or sequences.
        fits = x.ndim == 4 or (x.ndim >= 2 and x.dtype != torch.uint8)
        if x.dtype != torch.uint8:
            x = x.to(torch.float32)
    # Of two or more dimensions are class numbers of positions, or targets of a task of the user.
    are_targets = y.ndim >= 1 and (y.ndim <= 2 or y.dtype.kind in "iuf")
    if fits and are_targets and len(x) != len(y):
        raise DataError(
            f"{len(x)} examples in x but {len(y)} targets in y",
            place=where,
            cure="give one target for each example",
        )
    if not fits or not are_targets:
        raise DataError(
            f"x of shape {shape} and y of shape {list(y.shape)}",
            place=where,
            cure="expected uint8 images [n, C, H, W] or numbers of two or more dimensions "
            "[n, ...], "
            "and y [n] or [n, k] or, for a class at each position, whole numbers [n, ...]",
        )
    if len(y) == 0:
        raise DataError("no examples", place=where, cure="leave it out or give it some")
    return x, y


def _arrays(pair: Any, where: str) -> tuple[Any, np.ndarray]:
    """Returns the inputs, as a tensor or a dictionary of tensors, and the targets."""
    if is_dataset(pair):
        pair = as_pair(pair, where)
    try:
        if isinstance(pair, Arrays):
            pair = pair.x, pair.y
        x, y = pair
        # numpy converts lists, data frames and the arrays of other libraries.
        if isinstance(x, Mapping):
            return {name: torch.as_tensor(np.asarray(x[name])) for name in x}, np.asarray(y)
        return torch.as_tensor(np.asarray(x)), np.asarray(y)
    except (TypeError, ValueError) as error:
        got = type(pair).__name__
        if isinstance(pair, tuple | list) and len(pair) != 2:
            got += f" of {len(pair)}"
        elif isinstance(pair, tuple | list):
            got += f" that numpy cannot convert ({error})"
        raise DataError(f"expected a pair of arrays (x, y), got {got}", place=where) from error


def _in_our_type(t: Tensor) -> Tensor:
    """Returns floats as float32 and integers as int64; bytes and booleans stay as they are."""
    if t.dtype in (torch.uint8, torch.bool):
        return t
    if t.is_floating_point():
        return t.to(torch.float32)
    return t.to(torch.int64)


def _named(x: Mapping[str, Tensor], where: str) -> NamedInputs:
    """Checks and converts several inputs: numbers, integers, booleans or uint8 images."""
    for name, t in x.items():
        # uint8 of another shape may be images without channels, or numbers. We do not guess.
        if (t.dtype == torch.uint8 and t.ndim != 4) or t.is_complex():
            raise DataError(
                f"'{name}' holds {t.dtype} of shape {list(t.shape)}",
                place=where,
                cure="expected float32 or int64 [n, ...], or uint8 images [n, C, H, W]",
            )
    try:
        return NamedInputs({name: _in_our_type(t) for name, t in x.items()})
    except DataError as error:
        raise DataError(error.problem, place=where, cure=error.cure) from error


def _numbered(y: np.ndarray, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Returns labels as int64 [n], and their names.

    Example: ["ill", "well", "ill"] gives [0, 1, 0] and ("ill", "well"). Labels that are
    class numbers or booleans have no names: the second result is empty.
    """
    if y.dtype.kind in "US":
        words, positions = np.unique(y, return_inverse=True)
        return torch.from_numpy(positions.astype(np.int64)), tuple(str(word) for word in words)
    if y.dtype.kind not in "iub" or y.min() < 0:
        kind = "negative numbers" if y.dtype.kind == "i" else str(y.dtype)
        raise DataError(
            f"labels of type {kind}", place=where, cure="expected whole numbers from 0 up, or words"
        )
    return torch.from_numpy(y.astype(np.int64)), ()
