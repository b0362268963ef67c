"""Converts `data=` of a command (tensors, a pair, a Dataset or a DataLoader) to a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedpress import tasks
from fedpress.core import consent
from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import Inputs, NamedInputs, call, inputs_text, map_inputs
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.data.functions import refuse_one_hot
from fedpress.errors import DataError
from fedpress.nn.expected_input import input_cure
from fedpress.tasks import Binary, Regression, Task
from fedpress.training.evaluate import evaluating

TAKEN = (
    'a source such as "cifar10", a tensor of inputs or a dictionary of them, a pair '
    "(inputs, labels), a torch "
    "Dataset or DataLoader, or a FederatedData"
)
"""What the argument `data=` may be, for errors."""
TEST_SHARE = 0.2
"""Share of the examples that becomes the test set; with `clients=`, of each client's examples."""
VALIDATION_SHARE = 0.1
"""Share of the remaining examples that becomes the validation set."""


def in_memory(
    data: Any,
    preprocess: Preprocess,
    *,
    class_names: tuple[str, ...] = (),
    model: nn.Module | None = None,
    task: Task | None = None,
    named: str | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> FederatedData:
    """Converts data in memory to a data set whose training examples are all public.

    If there are labels, 20% of the examples become the test set. Of the remaining examples, 10%
    become the validation set. Inputs without labels can only be used for calibration, that is, to
    find the ranges of activations.

    Args:
        data: inputs; a pair (inputs, labels [n]); or a Dataset or DataLoader of inputs or of pairs.
            Inputs are uint8 images, floats or int64 token ids [n, ...], or a dictionary of these by
            the names of forward's arguments.
        preprocess: standardisation of the network's inputs.
        class_names: names of the model's classes, if the model has classes.
        model: the model. The number of classes is at least its number of outputs, since a small
            data set may lack a class. If the model refuses int64 inputs, the inputs are converted
            to floats.
        task: task of a saved model. None: derived from the labels. Float labels with the shape of
            the model's output mean a regression.
        named: the task that the user names, such as "forecast". What a task computes from targets,
            such as their mean, is computed from the public part of the data set that is returned.
        seed: seed for the choice of test and validation examples.

    Raises:
        DataError: if `data` has another type or no examples, if there are not as many labels as
            inputs, or if class numbers are negative or too large for the model. Labels that fit no
            task raise no error: they are dropped.
    """
    x, y = pair_of(data)
    if not len(x):
        raise DataError("it has no examples", place="data", cure="give some")
    outputs = len(class_names)
    shape: tuple[int, ...] | None = None
    if model is not None:
        x, shape = as_taken(x, model, preprocess)
        outputs = classes_in(shape)
    if y is None:
        return unlabelled(x, preprocess)
    if len(x) != len(y):
        raise DataError(
            f"{len(x)} inputs but {len(y)} labels",
            place="data",
            cure="give one label for each input",
        )
    if named is not None and (task is None or task.kind != tasks.kind_of(named)):
        return _with_named_task(named, x, y, shape, preprocess, class_names, seed)
    task = task or task_of_targets(y, shape)
    if task is not None and task.targets != "classes":
        return _divided(Arrays(x, y.to(torch.float32)), preprocess, seed, task=task)
    return _classified(x, y, outputs, preprocess, class_names, task, seed)


def _classified(
    x: Inputs,
    y: Tensor,
    outputs: int,
    preprocess: Preprocess,
    class_names: tuple[str, ...],
    task: Task | None,
    seed: int,
) -> FederatedData:
    """Returns a data set of class numbers; without labels if no task fits them.

    Args:
        x: inputs [n, ...].
        y: labels [n]; with a saved task also [n, ...], one for each position.
        outputs: number of the model's outputs; 0 if it is unknown.
        preprocess: standardisation of the inputs.
        class_names: names of the model's classes.
        task: task of a saved model; None: a classification.
        seed: seed of the random order.
    """
    # A saved task of a class at each position, such as a segmentation.
    positions = task is not None and y.dim() > 1
    if (y.dim() != 1 and not positions) or y.is_floating_point() or y.is_complex():
        # No task fits such labels. The inputs can still be used to calibrate.
        return unlabelled(x, preprocess)
    if task is not None and positions:
        return _divided(
            Arrays(x, y.to(torch.int64)),
            preprocess,
            seed,
            num_classes=len(task.names),
            class_names=task.names,
            task=task,
        )
    _check_classes(y, outputs)
    # A small data set may lack the last classes, so the number of the model's outputs counts too. A
    # classification has at least two classes.
    count = max(int(y.max()) + 1, outputs, 2)
    names = class_names
    if len(names) != count:
        names = tuple(str(number) for number in range(count))
    return _divided(
        Arrays(x, y.to(torch.int64)),
        preprocess,
        seed,
        num_classes=count,
        class_names=names,
        **({} if task is None else {"task": task}),
    )


def named_task(
    given: str | Mapping[str, Any],
    y: Tensor,
    outputs: tuple[int, ...] | None,
    names: Sequence[str] | None = None,
    *,
    public: Tensor | None = None,
) -> Task:
    """Makes the task that the user names. Uses only dtype and shape of the targets.

    Args:
        given: name of the task, or its name and options.
        y: targets [n, ...].
        outputs: shape of the model's output for one example; None if it is unknown.
        names: names of the classes or numbers; None or empty: "0", "1" and so on.
        public: public targets, from which a task computes values such as their mean; None: there
            are none, and private ones must not be read.

    Raises:
        RecipeError: if there is no such task.
        ModelError: if it is the user's own, and cannot be imported.
    """
    row, width = _named_row(given, y, outputs)
    found = y[:0] if public is None else public
    found = found.to(torch.int64 if row.targets == "classes" else torch.float32)
    return tasks.make(given, tuple(names or map(str, range(width))), found)


def _named_row(
    given: str | Mapping[str, Any], y: Tensor, outputs: tuple[int, ...] | None
) -> tuple[type[Task], int]:
    """Returns the class of the task that the user names, and how many names it needs."""
    kind = tasks.kind_of(given)
    # The user has named this code in the call, which is consent to call it.
    if tasks.is_own(kind):
        consent.allow(kind)
    row = tasks.find(kind)
    width = y.shape[1] if y.dim() > 1 else 1
    if row.kind == "binary":
        width = 2
    elif row.targets == "classes":
        # The first dimension of an output counts the classes, whatever positions follow.
        width = outputs[0] if outputs else width
    elif row.targets == "arrays":
        width = 1
    return row, width


def _with_named_task(
    named: str | Mapping[str, Any],
    x: Inputs,
    y: Tensor,
    shape: tuple[int, ...] | None,
    preprocess: Preprocess,
    class_names: tuple[str, ...],
    seed: int,
) -> FederatedData:
    """Returns a data set with the task that the user names, fitted on its public part."""
    row, width = _named_row(named, y, shape)
    classes = row.targets == "classes"
    y = y.to(torch.int64 if classes else torch.float32)
    # A saved forecast names its horizons, but the targets may also hold the value now.
    fits = len(class_names) == width or row.targets != "numbers"
    names = class_names if class_names and fits else tuple(map(str, range(width)))
    public = y[_positions(len(y), seed).public]
    task = tasks.make(named, names, public)
    about = {"num_classes": len(task.names), "class_names": task.names} if classes else {}
    return _divided(Arrays(x, y), preprocess, seed, task=task, **about)


def _check_classes(y: Tensor, outputs: int) -> None:
    """Refuses class numbers below 0 or above `outputs` - 1.

    If `outputs` is 0, the number of classes is unknown, and only negative numbers are refused.
    """
    if int(y.min()) < 0:
        raise DataError(
            "some labels are negative", place="data", cure="give class numbers from 0 up"
        )
    if outputs and int(y.max()) >= outputs:
        raise DataError(
            f"its labels go up to {int(y.max())}, but the model has {outputs} classes",
            place="data",
            cure=f"give class numbers from 0 to {outputs - 1}, or a model with more classes",
        )


class _Positions(NamedTuple):
    """Positions of the examples of each part of a data set, int64."""

    test: Tensor
    validation: Tensor
    public: Tensor


def _positions(n: int, seed: int) -> _Positions:
    """Divides `n` examples at random into a test, a validation and a public part."""
    # Shuffled, because data sets are often sorted by class.
    order = public_stream(seed, "data in memory").permutation(n)
    tests = int(TEST_SHARE * n)
    known = tests + int(VALIDATION_SHARE * (n - tests))
    return _Positions(order[:tests], order[tests:known], order[known:])


def _divided(every: Arrays, preprocess: Preprocess, seed: int, **about: Any) -> FederatedData:
    """Splits the examples at random into a test, a validation and a public part.

    Args:
        every: all examples.
        preprocess: standardisation of the inputs.
        seed: seed of the random order.
        about: further fields of `FederatedData`: the task, or the classes.
    """
    test, checked, public = _positions(len(every), seed)
    parts = ("client 'nobody'", "public part", "validation part", "test part")
    with naming_parts(dict.fromkeys(parts, "data")):
        return FederatedData(
            name="data in memory",
            # A data set needs at least one client. No stage of such a command uses this client.
            clients={"nobody": every.take(public[:1])},
            public=every.take(public),
            validation=every.take(checked),
            test=every.take(test),
            preprocess=preprocess,
            **about,
        )


def task_of_targets(y: Tensor, outputs: tuple[int, ...] | None) -> Task | None:
    """Derives a regression or a binary classification from labels and outputs; else returns None.

    Float labels [n] or [n, k], and a model with 1 or k outputs, mean a regression. Integer labels
    [n], and a model with one output, mean a binary classification.

    Args:
        y: the labels.
        outputs: shape of the model's output for one example; None if it is unknown.

    Raises:
        DataError: if floats look like classes in one-hot form.
    """
    if outputs is None or y.dim() not in (1, 2):
        return None
    width = 1 if y.dim() == 1 else y.shape[1]
    if y.is_floating_point() and outputs == (width,):
        refuse_one_hot(y.numpy(), "data")
        several = tuple(f"target {at}" for at in range(width))
        return Regression(several if width > 1 else ("target",))
    if not y.is_floating_point() and outputs == (1,) and y.dim() == 1:
        return Binary(("0", "1"))
    return None


@torch.no_grad()
def as_taken(
    x: Inputs, model: nn.Module, preprocess: Preprocess
) -> tuple[Inputs, tuple[int, ...] | None]:
    """Returns the inputs in the dtype that the model takes, and the shape of one output.

    If the model fails on int64 inputs but runs on floats, the inputs are converted to floats. The
    shape is None if the model fails on both or does not return a tensor. No error is raised here,
    because `first_state` checks the model and explains the error.
    """
    whole = isinstance(x, Tensor) and x.dtype == torch.int64
    with evaluating(model):
        for rows in (x, map_inputs(x, Tensor.float)) if whole else (x,):
            try:
                out = call(model, preprocess(rows[:2]))
            except Exception:  # a user's network may raise anything
                continue
            return rows, tuple(out.shape[1:]) if isinstance(out, Tensor) else None
    return x, None


@torch.no_grad()
def check_taken(x: Inputs, model: nn.Module, preprocess: Preprocess, place: str) -> None:
    """Checks that a model takes the first two examples.

    Raises:
        DataError: if the model fails. If it can be found out which inputs the model takes, the
            error says so.
    """
    with evaluating(model):
        given = preprocess(x[:2])
        try:
            call(model, given)
        except Exception as error:  # a user's network may raise anything
            raise DataError(
                f"the model does not take examples of {inputs_text(x)} ({type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]})",
                place=place,
                cure=input_cure(model, given, "give examples in the shape that the model takes"),
            ) from error


@contextmanager
def naming_parts(names: Mapping[str, str]) -> Iterator[None]:
    """Makes errors about a part of a data set name the argument that the user gave.

    Args:
        names: name of the part in errors, such as "test part" -> name of the argument, such as
            "test".
    """
    try:
        yield
    except DataError as error:
        part = error.place.rpartition(": ")[2]
        error.place = names.get(part, error.place)
        raise


def classes_in(outputs: tuple[int, ...] | None) -> int:
    """Returns the number of classes of a classifier with output shape `outputs`.

    Returns 0 if the model is no classifier with one output per class, or the shape is unknown.
    """
    return outputs[0] if outputs is not None and len(outputs) == 1 and outputs[0] > 1 else 0


def unlabelled(x: Inputs, preprocess: Preprocess) -> FederatedData:
    """Returns a data set of inputs without labels; all examples are in its public part."""
    # A data set must have a label for each example. `labelled=False`: these zeros are no labels.
    public = Arrays(x, torch.zeros(len(x), dtype=torch.int64))
    none = Arrays(x[:0], public.y[:0])
    one = public.take(torch.zeros(1, dtype=torch.int64))
    return FederatedData(
        "inputs in memory",
        {"nobody": one},
        public,
        none,
        none,
        1,
        ("unknown",),
        preprocess,
        labelled=False,
    )


def pair_of(data: Any) -> tuple[Inputs, Tensor | None]:
    """Splits data in memory into inputs and labels; the labels are None if there are none.

    Raises:
        DataError: if `data` has an unknown type (`TAKEN` lists the known types), or its items
            cannot be joined, for instance because they differ in shape.
    """
    if isinstance(data, Tensor | np.ndarray | Mapping):
        return inputs_of(data), None
    if (
        isinstance(data, tuple | list)
        and len(data) == 2
        and isinstance(data[0], Tensor | np.ndarray | Mapping)
        and isinstance(data[1], Tensor | np.ndarray)
    ):
        return inputs_of(data[0]), _labels_of(data[1])
    if isinstance(data, DataLoader):
        return _joined(data, torch.cat)
    if isinstance(data, Dataset) and isinstance(data, Sized):
        # Not `for item in data`: iteration over a Dataset ends only if it raises IndexError.
        return _joined((data[i] for i in range(len(data))), torch.stack)
    if isinstance(data, Dataset):
        raise DataError(
            "this Dataset has no length",
            place="data",
            cure="give it a __len__, or an IterableDataset in a DataLoader, or tensors",
        )
    raise DataError(f"got {type(data).__name__}, expected {TAKEN}", place="data")


def _labels_of(labels: Tensor | np.ndarray) -> Tensor:
    """Converts labels in memory to a tensor.

    Raises:
        DataError: if they are no numbers, for instance words.
    """
    # The kinds of numbers: bool, signed and unsigned integers, floats.
    if isinstance(labels, np.ndarray) and labels.dtype.kind not in "biuf":
        raise DataError(
            f"labels of the type {labels.dtype}, expected numbers",
            place="labels",
            cure="number the classes: names, y = numpy.unique(y, return_inverse=True)",
        )
    return torch.as_tensor(labels)


def _joined(items: Iterable[Any], join: Any) -> tuple[Inputs, Tensor | None]:
    """Joins the items of a Dataset or the batches of a DataLoader.

    Args:
        items: inputs, or pairs of inputs and labels.
        join: `torch.cat` for batches, `torch.stack` for single examples.
    """
    inputs: list[Any] = []
    labels: list[Tensor] = []
    for item in items:
        if isinstance(item, Mapping):
            raise DataError(
                "its items are dictionaries",
                place="data",
                cure="give pairs (inputs, labels); `inputs` may be a dictionary",
            )
        parts = item if isinstance(item, tuple | list) else (item,)
        if len(parts) not in (1, 2):
            raise DataError(
                f"an item has {len(parts)} parts",
                place="data",
                cure="give pairs (inputs, labels), or inputs alone",
            )
        try:
            inputs.append(_as_tensors(parts[0]))
            labels += [torch.as_tensor(part) for part in parts[1:]]
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"an item contains {type(parts[0]).__name__}, not a tensor",
                place="data",
                cure="add a transform that converts it to a tensor",
            ) from error
    # Otherwise labels would be paired with the inputs of other items.
    if labels and len(labels) != len(inputs):
        raise DataError(
            "some items have labels and some have none",
            place="data",
            cure="give all of them labels",
        )
    if not inputs:
        raise DataError("it has no examples", place="data", cure="give some")
    try:
        return inputs_of(_together(inputs, join)), join(labels) if labels else None
    except RuntimeError as error:
        raise DataError(
            "its items have different shapes",
            place="data",
            cure="give all of them the same shape: pad sequences to one length, and give the "
            "lengths as a second input",
        ) from error


def _as_tensors(part: Any) -> Any:
    """Returns the inputs of one item as a tensor or as a dictionary of tensors."""
    if isinstance(part, Mapping):
        return {name: _as_tensors(value) for name, value in part.items()}
    return torch.as_tensor(part if isinstance(part, Tensor) else np.asarray(part))


def _together(items: list[Any], join: Any) -> Any:
    """Joins tensors with `join`. If items are dictionaries, joins the tensors of each name.

    Raises:
        RuntimeError: if the items differ in shape or in the names of their tensors.
    """
    first = items[0]
    if not isinstance(first, Mapping):
        return join(items)
    if any(not isinstance(item, Mapping) or item.keys() != first.keys() for item in items):
        # The same type as torch's error for other shapes, which the caller catches.
        raise RuntimeError("other names")
    return {name: join([item[name] for item in items]) for name in first}


def inputs_of(x: Tensor | np.ndarray | Mapping[str, Any]) -> Inputs:
    """Returns inputs as uint8, float32 or int64; named inputs may also be bool.

    Raises:
        DataError: if a tensor has fewer than two dimensions (named inputs: no dimension that counts
            examples), or the inputs are complex numbers.
    """
    if isinstance(x, Mapping):
        named = {name: _typed(torch.as_tensor(value)) for name, value in x.items()}
        try:
            return NamedInputs(named)
        except DataError as error:
            raise DataError(error.problem, place="data", cure=error.cure) from error
    found = torch.as_tensor(x)
    if found.dim() < 2:
        raise DataError(
            f"inputs of shape {list(found.shape)}",
            place="data",
            cure="the first dimension counts examples: [n, ...]",
        )
    return _typed(found.long() if found.dtype == torch.bool else found)


def _typed(x: Tensor) -> Tensor:
    """Converts a tensor to a dtype that examples may have: uint8, bool, int64 or float32."""
    # Data sets are kept on the CPU; batches are moved to the device one at a time.
    x = x.detach().cpu()
    x = x if x.layout == torch.strided else x.to_dense()
    if x.is_complex():
        raise DataError("inputs are complex numbers", place="data", cure="give real ones")
    if x.is_floating_point():
        return x.to(torch.float32)
    # uint8 stays: it means an image, whose bytes are scaled to 0..1.
    return x if x.dtype in (torch.uint8, torch.bool) else x.to(torch.int64)
