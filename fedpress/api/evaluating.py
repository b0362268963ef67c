"""Defines `fedpress.evaluate` (measures a model) and `fedpress.predict` (returns predictions).

A model is a `torch.nn.Module` or the path of a saved model. A task, such as "binary", says how
outputs become predictions, and which loss and metrics are computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress import tasks
from fedpress.api.calls import DataArguments, Mean, Model, bind, call_scope, model_of
from fedpress.api.continuing import continuations, next_logits
from fedpress.api.predictors import Predictor, predictor_of
from fedpress.core.inputs import Inputs
from fedpress.data import FederatedData, Preparation
from fedpress.data.labelled import KINDS, SUFFIXES
from fedpress.data.paths import refuse_no_path
from fedpress.data.preparation_parts import TextPart
from fedpress.data.raw_inputs import Table as RawTable
from fedpress.data.raw_inputs import UnknownWords
from fedpress.data.raw_kinds import is_raw, read_raw
from fedpress.data.settings import DataSettings
from fedpress.errors import Argument, DataError, ModelError
from fedpress.pipeline.arguments import errors_of_command
from fedpress.pipeline.commands.chosen_data import Standardization
from fedpress.pipeline.commands.clients import Clients
from fedpress.pipeline.commands.given import classes_in, pair_of
from fedpress.pipeline.start import first_state
from fedpress.tasks import Classification, Language, Task
from fedpress.training import evaluate as evaluation


def evaluate(
    model: Model,
    data: Any = None,
    *,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    mean: Mean = None,
    std: Sequence[float] | None = None,
    task: str | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    allow_code: Collection[str] | str = (),
) -> dict[str, JsonValue]:
    """Computes loss and metrics of a model on labelled examples.

    Args:
        model: a torch module, a `Result`, the path of a saved model or run, or the name of a
            function that builds the model, as `package.module:function`.
        data: a pair (inputs, labels), a torch Dataset or a DataLoader: all examples are used. The
            name of a source of data such as "digits", or a `FederatedData`: the test part is used.
            None: the test part of the run that wrote the model.
        path: file or folder of the source, if `data` names a source that reads files. Without
            `data`, a .csv or .parquet file with the columns of the run that wrote the model: all
            its rows are prepared as that run prepared its own, and all are used.
        checkpoint: file with a state dict for the model that `module:function` builds.
        mean: mean of each input channel, for a model that was trained by another program. Inputs
            become (x - mean) / std.
        std: standard deviation of each input channel.
        task: the task, such as "binary"; None: it is found from the model and the labels.
        device: device to compute on, such as "cuda:1".
        allow_code: functions that may be called to build the model, as `module:function`.

    Returns:
        A dictionary: every metric of the task (such as "accuracy"), the "loss", and the number of
        "examples".

    Raises:
        FedpressError: if model and data do not fit, or there are no labelled examples.

    >>> import torch, fedpress
    >>> net = torch.nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.eye(2)), net.bias.zero_()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    >>> found = fedpress.evaluate(net, (x, torch.tensor([0, 1, 0, 0])))
    >>> found["accuracy"], found["examples"]
    (0.75, 4)
    """
    model, mean, std = model_of(model, mean, std)
    # A saved model may name the data of its run, a module cannot.
    if data is None and isinstance(model, nn.Module):
        raise _nothing_to_measure_on()
    in_memory = data is not None and not isinstance(data, str)
    held = data
    if in_memory and not isinstance(data, FederatedData):
        # `bind` expects a federated data set. Only its test part is used here.
        held = Clients({"all": data}, test=data, task=task, place="data")
    arguments = DataArguments(held, path, checkpoint, None, mean, std, device)
    settings: dict[str, Any] = {}
    # For data in memory, `Clients` has the task already.
    if task is not None and not in_memory:
        settings["data.task"] = task
    table = None
    if data is None and path is not None and Path(path).suffix in SUFFIXES:
        table = Path(path)
        # The run's own data say how rows become inputs, and which classes there are.
        arguments = replace(arguments, path=None)
    with call_scope(allow_code) as stack:
        _, bound, loaded = bind("measure", model, arguments, settings, stack)
        if table is not None:
            loaded = _with_rows(loaded, table, bound.recipe.data)
        if not len(loaded.test):
            raise _nothing_to_measure_on()
        with errors_of_command("evaluate"):
            state = first_state(bound.recipe, loaded)
        found = evaluation.evaluate(
            state.model.to(state.device),
            loaded.test,
            loaded.preprocess,
            loaded.task,
            all_metrics=True,
        )
    return {**found.metrics, "loss": found.loss, "examples": found.examples}


def _with_rows(loaded: FederatedData, table: Path, settings: DataSettings) -> FederatedData:
    """Returns the data set with all examples of another file as its test part.

    Raises:
        DataError: if the data of the run are of another kind, or the file does not fit them.
    """
    kind = None if loaded.preparation is None else KINDS.get(loaded.preparation.kind)
    if loaded.preparation is None or kind is None or not kind.takes(table):
        raise DataError(
            f"the model was not trained on {table.suffix} data, by a run that is known here",
            place=f"'{table}'",
            cure=("give ", Argument("data", "(INPUTS, LABELS)"), ", or a source and its path"),
        )
    rows, left_out = kind.read(table, loaded.preparation, settings, loaded.task)
    if left_out:
        warnings.warn(
            f"{left_out} {kind.unit} of '{table}' are left out: they have no label, or a label or word "
            "that the run does not know",
            stacklevel=3,
        )
    return replace(loaded, test=rows, test_owners=None, test_owner_names=())


def _nothing_to_measure_on() -> DataError:
    return DataError(
        "there are no labelled examples to measure on",
        place="data",
        cure=("give ", Argument("data", "(INPUTS, LABELS)"), ", or a source with a test part"),
    )


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a model for n examples.

    Attributes:
        answers: the prediction for each example. Classification: class numbers, int64 [n].
            Multi-label classification: 0 or 1 for each label [n, k]. Regression: numbers in the
            units of the targets. Survival: median and mean time [n, 2].
        probabilities: probability of each class or label [n, k]; survival: that of no event until
            each edge; None for a regression.
        outputs: outputs of the network [n, ...], for example logits. For a task of the user with
            several outputs, what forward returns.
        names: names of the classes, of the labels, or of the numbers that are predicted.
        task: kind of task, such as "classification". If the model names no task, it is
            "classification" for one vector of at least 2 outputs per example, else "unknown".
        ignored: columns of raw rows that are neither inputs nor labels.
        examples: columns that tell examples of raw data apart, such as "file" or "time" -> a value
            for each example.
        rows: the table of the predictions, if it is not a row for each example with its answers: a
            forecast has a row for each horizon, a text its continuation.
        probability_names: what each probability is of, such as a class.
    """

    answers: Tensor
    probabilities: Tensor | None
    outputs: Tensor
    names: tuple[str, ...]
    task: str
    ignored: tuple[str, ...] = ()
    examples: Mapping[str, list[Any]] = field(default_factory=dict)
    rows: RawTable | None = None
    probability_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def labels(self) -> list[str]:
        """The name of each example's class; `answers` has the class numbers.

        Raises:
            DataError: if `answers` is not one class number for each example.
        """
        # Regression gives floats; several labels or tokens give more than one dimension.
        if self.answers.dim() != 1 or self.answers.is_floating_point():
            raise DataError(
                f"the task {self.task} does not give one class for each example",
                place="labels",
                cure="use the attribute answers instead",
            )
        return [self.names[number] for number in self.answers.tolist()]

    @property
    def array(self) -> Tensor:
        """What a .npy file holds: the outputs; if there are several for an example, the answers."""
        return self.outputs if isinstance(self.outputs, Tensor) else self.answers

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Returns column names and one row per example: its predictions, then its probabilities.

        Examples of raw data begin with the columns of `examples`. See `rows` for other tables.

        Raises:
            DataError: if an example has several predictions, such as one for each token.
        """
        if self.rows is not None:
            return self.rows
        answers = self.answers.reshape(len(self), -1)
        one_each = self.answers.dim() == 1 and not self.answers.is_floating_point()
        names = ["class"] if one_each else list(self.names)
        # The answers of a task of the user, such as boxes, have other columns than its targets.
        if tasks.is_own(self.task) and self.answers.dim() == 2:
            names = [f"answer {at}" for at in range(answers.shape[1])]
        if answers.shape[1] != len(names):
            raise DataError(
                f"answers of shape {list(self.answers.shape)} are no table",
                place="predictions",
                cure="write them as an array, to a file that ends in .npy",
            )
        rows = [[label] for label in self.labels] if one_each else answers.tolist()
        for column in reversed([*self.examples.values()]):
            rows = [[value, *row] for value, row in zip(column, rows, strict=True)]
        names = [*self.examples, *names]
        if self.probabilities is None:
            return names, rows
        shares = [f"probability of {name}" for name in self.probability_names]
        return [*names, *shares], [
            row + share for row, share in zip(rows, self.probabilities.tolist(), strict=True)
        ]


def predict(
    model: Model,
    inputs: Any,
    *,
    checkpoint: str | Path | None = None,
    mean: Mean = None,
    std: Sequence[float] | None = None,
    unknown: UnknownWords = "error",
    tokens: int = 20,
    allow_code: Collection[str] | str = (),
) -> Predictions:
    """Returns the predictions of a model for examples, which need no labels.

    Args:
        model: a torch module, a `Result`, the path of a saved model, run or exported file (such as
            "model.onnx"), or the name of a function that builds the model, as
            `package.module:function`.
        inputs: raw data of the kind that the model was trained on, which are prepared as the
            training prepared its own. Rows of a table, also for windows over a series: the path of
            a .csv or .parquet file, a list of dictionaries, a pandas data frame or a pyarrow table.
            Columns may be in any order; further columns are ignored. Texts: a .txt file, a folder
            of them, a list of texts, or a table with a column "text". Recordings or images: a file,
            a folder or a list of files.
            Or prepared examples: uint8 images, numbers or token ids [n, ...]; a dictionary of such
            arrays for a model of several inputs; the path of a .npy file, or of a .npz file for
            several inputs; a Dataset or DataLoader, whose labels are ignored. For a saved model the
            inputs are standardised as in its training. A module gets the inputs unchanged, except
            that uint8 images are scaled to 0..1.
        checkpoint: file with a state dict for the model that `module:function` builds.
        mean: mean of each input channel, for a model that was trained by another program. Inputs
            become (x - mean) / std.
        std: standard deviation of each input channel.
        unknown: what a word in a raw row does that the training did not know: "error", or "zeros"
            in all inputs of its column, as in the training. In a text, "zeros" is token 0.
        tokens: how many tokens continue each text, for a language model.
        allow_code: functions that may be called to build the model, as `module:function`.

    Raises:
        FedpressError: if the model does not take these inputs.

    >>> import torch, fedpress
    >>> net = torch.nn.Linear(2, 3)
    >>> found = fedpress.predict(net, torch.randn(5, 2))
    >>> found.answers.shape, found.probabilities.shape
    (torch.Size([5]), torch.Size([5, 3]))
    """
    given, mean, std = model_of(model, mean, std)
    with call_scope(allow_code):
        predictor = predictor_of(given, checkpoint, Standardization.of(mean, std))
        if is_raw(inputs):
            return _of_raw_data(
                predictor, inputs, _preparation_of(predictor, given), unknown, tokens
            )
        x = _read(inputs)
        if predictor.preparation is not None:
            _refuse_unknown_tokens(x, predictor.preparation)
        joined, shape = predictor.outputs(x, raw=False)
    return _predictions(joined, shape, predictor.task)


def _of_raw_data(
    predictor: Predictor, given: Any, about: Preparation, unknown: UnknownWords, tokens: int
) -> Predictions:
    """Prepares raw data and predicts them."""
    raw = read_raw(given, about, unknown)
    joined, shape = predictor.outputs_of_raw(raw)
    task = predictor.task
    if raw.tokens and task is not None and task.kind == Language.kind:
        # The answer of a language model is the token after the text.
        joined = next_logits(joined, raw.tokens)
        found = _predictions(joined, shape, Classification(task.names))
        return replace(
            found,
            task=task.kind,
            ignored=raw.ignored,
            examples=raw.names,
            rows=continuations(predictor, raw, about, joined, tokens),
        )
    found = _predictions(joined, shape, task)
    rows = None if raw.table is None else raw.table(found.answers)
    return replace(found, ignored=raw.ignored, examples=raw.names, rows=rows)


def _refuse_unknown_tokens(x: Inputs, about: Preparation) -> None:
    """Checks that prepared texts are token numbers of the vocabulary.

    Raises:
        DataError: if they have no tokens, or a number is not in the vocabulary.
    """
    part = about.part
    if not isinstance(part, TextPart) or not isinstance(x, Tensor) or x.dtype != torch.int64:
        return
    if not x.numel():
        raise DataError(
            f"sequences of shape {list(x.shape)} have no token",
            place="inputs",
            cure=f"give int64 [n, {part.settings.length}], token numbers",
        )
    wrong = (x < 0) | (x >= len(part.vocabulary))
    if bool(wrong.any()):
        raise DataError(
            f"{int(x[wrong][0])} is the number of no token: the vocabulary has "
            f"{len(part.vocabulary)}",
            place="inputs",
            cure=f"give numbers from 0 to {len(part.vocabulary) - 1}, or the text itself",
        )


def _predictions(joined: Tensor, shape: tuple[int, ...] | None, task: Task | None) -> Predictions:
    """Returns the predictions of a task from the outputs of a model.

    Args:
        joined: outputs [n, ...].
        shape: shape of one output, for a model without a task.
        task: the task of the model; None if it is not known.
    """
    # If the task is not known (a module without a spec), one vector of outputs per example is taken
    # as logits.
    if task is None and (count := classes_in(shape)):
        task = Classification(tuple(map(str, range(count))))
    # Other outputs, such as images, are returned as they are.
    if task is None:
        names = tuple(f"output {at}" for at in range(joined[0].numel()))
        return Predictions(joined, None, joined, names, "unknown")
    answers = task.answers(joined)
    if not isinstance(answers, Tensor):
        raise ModelError(
            f"the task {task.kind} gives {type(answers).__name__} as answers, expected one tensor",
            place="model",
            cure="define answers(self, outputs) in its class: one row for each example",
        )
    return Predictions(
        answers,
        task.probabilities(joined),
        joined,
        task.answer_names,
        task.kind,
        probability_names=task.probability_names,
    )


def _preparation_of(predictor: Predictor, model: object) -> Preparation:
    """Returns how raw rows become inputs of the model.

    Raises:
        DataError: if the model does not say how raw data become its inputs.
    """
    if predictor.preparation is None:
        name = type(model).__name__ if isinstance(model, nn.Module) else f"'{model}'"
        raise DataError(
            f"{name} does not say how raw data, such as rows of a table, become its inputs",
            place="inputs",
            cure="give prepared examples: arrays, or a file of numpy.save (.npy)",
        )
    return predictor.preparation


def _read(inputs: Any) -> Inputs:
    """Returns the inputs in memory, or reads them from a NumPy file. Labels are dropped.

    Raises:
        DataError: if `inputs` has a type that `predict` does not take.
    """
    if isinstance(inputs, str | Path):
        inputs = _arrays_of(Path(inputs))
    try:
        return pair_of(inputs)[0]
    except DataError as error:
        # The error of `pair_of` names the argument `data`, as other calls have it. `predict` has
        # `inputs` instead.
        if error.place == "data":
            error.place = "inputs"
        raise


def _arrays_of(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Reads a NumPy file. Nothing is unpickled, since a pickle may run any code."""
    refuse_no_path(path, "inputs")
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # NumPy's message is not shown: it advises allow_pickle=True, which may run any code.
        reason = error.strerror if isinstance(error, OSError) else "it holds no plain array"
        raise DataError(
            f"cannot read '{path}' ({reason})",
            place="inputs",
            cure="give a table (.csv, .parquet), a file of numpy.save (.npy), or of numpy.savez for "
            "several inputs (.npz)",
        ) from error
    return dict(found) if isinstance(found, np.lib.npyio.NpzFile) else found
