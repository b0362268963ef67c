"""Converts the data that a user gives to a command to the table `[data]` of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpress.core.examples import Preprocess
from fedpress.core.inputs import dtype_of
from fedpress.data import FederatedData
from fedpress.errors import Argument, DataError, ModelError
from fedpress.pipeline.commands.subject import (
    NO_SOURCE,
    ChosenModel,
    Outputs,
    form_text,
    outputs_of,
)
from fedpress.pipeline.recipe import Override


@dataclass(frozen=True)
class Standardization:
    """The standardisation of inputs that the user asks for: (x - mean) / std for each channel.

    Attributes:
        mean: one number for each channel; None: the mean of the data.
        std: one number for each channel; None: the standard deviation of the data.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    @classmethod
    def of(cls, mean: object, std: object) -> Standardization | None:
        """Converts the arguments `mean=` and `std=` of a command.

        Args:
            mean: one number for each channel; "none": inputs stay as they are; "data": mean and
                standard deviation are computed from the data; None: not given.
            std: one number for each channel; None: not given.

        Returns:
            The standardisation; None if neither argument is given.

        Raises:
            DataError: if `mean` or `std` is neither a finite number nor a sequence of such numbers,
                if a std is not above 0 or is given with a word as mean, or if the lengths differ.
        """
        if mean is None and std is None:
            return None
        if mean in ("none", "data"):
            if std is not None:
                raise DataError(
                    f"with mean='{mean}' no std can be given",
                    place="std",
                    cure="leave it out",
                )
            # Mean 0 and std 1 leave the inputs as they are.
            return cls((0.0,), (1.0,)) if mean == "none" else cls(None, None)
        means = _numbers("mean", mean, beside=(", or ", Argument("mean", "none")))
        deviations = _numbers("std", std, above_0=True, beside=(", all above 0",))
        if len(means) != len(deviations):
            raise DataError(
                f"{len(deviations)} values of std for {len(means)} of mean",
                place="std",
                cure="give one mean and one std for each channel",
            )
        return cls(means, deviations)

    def table(self) -> dict[str, Any]:
        """Returns the keys `mean` and `std` of the table `[data]`."""
        if self.mean is None or self.std is None:
            return {}
        return {"mean": list(self.mean), "std": list(self.std)}

    def preprocess(self) -> Preprocess:
        """Returns the standardisation as a `Preprocess`, for data in memory."""
        return Preprocess(self.mean or (), self.std or ())


def _numbers(
    name: str, given: Any, *, above_0: bool = False, beside: tuple[str | Argument, ...]
) -> tuple[float, ...]:
    """Converts `mean=` or `std=` to a tuple of floats.

    Args:
        name: name of the argument.
        given: a number, or a sequence of numbers.
        above_0: whether all numbers must be above 0.
        beside: text at the end of the error's cure, such as ", all above 0".
    """
    try:
        values = (given,) if isinstance(given, int | float) else given
        row = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        row = ()
    fine = row and all(math.isfinite(value) and (value > 0 or not above_0) for value in row)
    if not fine:
        example = Argument(name, (0.5, 0.5, 0.5))
        raise DataError(
            "not given" if given is None else f"got {given!r}, expected numbers",
            place=name,
            cure=("give one number for each channel, such as ", example, *beside),
        )
    return row


@dataclass(frozen=True)
class ChosenData:
    """The data that a user gives to a command.

    Attributes:
        source: name of the data, such as "cifar10" or "csv"; None: the data of the run that wrote
            the model, if there is such a run.
        path: file or folder that the source reads.
        shape: shape of one example; needed for an architecture if there are no data.
        data_set: data set in memory, instead of a source.
        given: standardisation that the user asks for. None: the standardisation of the saved
            model; without a saved model, the mean and std of the public examples.
    """

    source: str | None = None
    path: Path | None = None
    shape: tuple[int, ...] | None = None
    data_set: FederatedData | None = None
    given: Standardization | None = None

    def is_empty(self, chosen_model: ChosenModel) -> bool:
        """Whether there are no examples at all.

        This is so if the user gives no source and no data set, and the model comes from no run that
        names its data.
        """
        return self.source is None and self.data_set is None and chosen_model.data() is None

    def table(
        self,
        chosen_model: ChosenModel,
        keys: Sequence[Override],
        *,
        needs_clients: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        """Returns the seed of the recipe, and its table `[data]`.

        If the user gives no data, data and seed are taken from the run that wrote the model. So the
        test set is the same, and has no example that the model was trained on.

        Args:
            chosen_model: the model.
            keys: keys of the recipe that the user has set.
            needs_clients: whether the stage trains on clients. If not, all training examples are
                public: the stage may use them directly.

        Raises:
            DataError: if there is a path without a source.
            ModelError: if the shape of an example is not known.
        """
        seed = 0
        if self.source is not None:
            table = self._of_source(self.source, chosen_model, needs_clients)
        elif self.data_set is not None:
            table = table_of(self.data_set)
        elif (found := chosen_model.data()) is not None:
            table, seed = found
        else:
            table = {"source": NO_SOURCE, "path": _shape(chosen_model, keys, self.shape)}
        if self.path is None:
            return seed, table
        if table["source"] == NO_SOURCE:
            raise DataError(
                "a path needs a source that reads it",
                place="path",
                cure=("name the source too, such as ", Argument("data", "cifar10")),
            )
        # Absolute, because the recipe may be run again from another folder.
        return seed, {**table, "path": str(self.path.resolve())}

    def _of_source(
        self, source: str, chosen_model: ChosenModel, needs_clients: bool
    ) -> dict[str, Any]:
        table: dict[str, Any] = {"source": source}
        if not needs_clients:
            # A data set needs at least one client. This client gets one example; all other
            # examples are public.
            table |= {"num_clients": 1, "examples_per_client": 1, "partition": {"kind": "iid"}}
        # A saved model expects the standardisation with which it was trained.
        if chosen_model.spec is not None and chosen_model.spec.mean:
            table |= {
                "mean": list(chosen_model.spec.mean),
                "std": list(chosen_model.spec.std),
            }
        if chosen_model.spec is not None and chosen_model.spec.task:
            table["task"] = chosen_model.spec.task["kind"]
        return table | (self.given.table() if self.given is not None else {})

    def question(self, chosen_model: ChosenModel, keys: Sequence[Override]) -> DataError | None:
        """Returns a warning if another program trained the model, and `mean` is not given.

        There is also no warning if the data come from no source, such as data in memory.

        It is only a warning, because the measured accuracy is right if the model was trained on
        the same data.
        """
        said = self.given is not None or any(key.key == "data.mean" for key in keys)
        if self.source is None or said or not chosen_model.foreign:
            return None
        return DataError(
            f"'{chosen_model.name}' brings its own weights, but its accuracy is measured on "
            "inputs standardised with the mean and std of these data",
            place="mean",
            cure=(
                "if it was trained with another mean and std, give them for each channel (of "
                "images with values from 0 to 1), such as ",
                Argument("mean", (0.485, 0.456, 0.406)),
                " and ",
                Argument("std", (0.229, 0.224, 0.225)),
                ", or ",
                Argument("mean", "none"),
                " if it takes inputs without standardisation",
            ),
        )


def table_of(data: FederatedData) -> dict[str, Any]:
    """Returns the `[data]` table for a data set in memory: shape, classes, mean and std."""
    # The recipe is text and cannot hold the examples. Checks before a run need only these facts.
    dtype = dtype_of(data.public.x)
    kinds = ":int64" if dtype == "int64" else ""
    count = data.num_classes if data.labelled else 0
    shape = form_text(data.example_shape, dtype)
    table: dict[str, Any] = {"source": NO_SOURCE, "path": f"{shape}:{count}{kinds}"}
    if data.preprocess.mean:
        table |= {"mean": list(data.preprocess.mean), "std": list(data.preprocess.std)}
    return table


def _shape(
    chosen_model: ChosenModel, keys: Sequence[Override], shape: tuple[int, ...] | None
) -> str:
    """Returns the input shape and the number of classes of a model as text, such as `3x32x32:10`.

    `no_data` makes the placeholder data set from this text.
    """
    if chosen_model.spec is not None:
        saved = chosen_model.spec
        if isinstance(saved.input_shape, dict):
            form = form_text(saved.input_shape, dict(saved.input_dtype))  # type: ignore[arg-type]
            return f"{form}:{len(saved.class_names)}"
        # A model without class names must be run once, which shows how many outputs it has.
        shape, model = saved.input_shape, saved.build() if not saved.class_names else None
        found = Outputs(len(saved.class_names), saved.input_dtype == "int64")
    else:
        if shape is None:
            raise ModelError(
                f"the shape of an example of '{chosen_model.name}' is not known",
                place="input_shape",
                cure=(
                    "give it, such as ",
                    Argument("input_shape", (3, 32, 32)),
                    ", or data with ",
                    Argument("data", "SOURCE"),
                ),
            )
        model = chosen_model.fresh(keys)
    if model is not None:
        found = outputs_of(model, shape)
    return f"{'x'.join(map(str, shape))}:{found.classes}{':int64' if found.tokens else ''}"
