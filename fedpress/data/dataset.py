"""A federated data set: clients with private examples, a public part, validation and test sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import (
    NamedInputs,
    Shape,
    inputs_text,
    shape_of,
    signature_of,
    tensors_by_name,
)
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.preparation import Preparation
from fedpress.errors import DataError
from fedpress.tasks import Classification, Regression, Task


@dataclass(frozen=True)
class FederatedData:
    """The data of a run: private examples by client, a public part, a validation and a test set.

    Attributes:
        name: name of the source, for the report.
        clients: client name -> private examples of this client, in a fixed order.
        public: training examples that are declared public, without the validation set; may be
            empty.
        validation: public examples on which every choice is made, such as early stopping.
        test: examples on which the model is measured after each stage; no choice depends on them.
        num_classes: number of classes; labels are 0 to num_classes - 1. 0 for tasks without
            classes.
        class_names: one name per class.
        preprocess: maps raw examples to the input of a network; given in the recipe, or fitted on
            `public` only.
        left_out: numbers of rows that were dropped because their label or a word is unknown, by the
            keys "public", "validation", "test" and "clients" (all clients together; this number is
            private). Empty if the source defines all classes itself.
        labelled: whether `y` has real labels. If not, only the inputs are used, for calibration and
            for comparing outputs.
        preparation: how raw data become inputs; None if the source does not say it. It is saved
            beside exported files. So everything in it either is in the recipe (the TOML file
            that describes the run) or comes from public rows.
        awaits_statistics: whether a private query has still to give the standardisation and the
            values of missing cells, which are `MISSING` until then; see
            `fedpress.data.statistics.settled`.
        task: what is learned. By default a classification if there are class names or integer
            targets; else a regression of float targets in their own units.
        columns: what the columns of a table hold, if `load` was asked to describe them.
        test_owners: int64 [n]: the natural client of each test example, as a position in
            `test_owner_names`; None if clients are not natural, or the test set is of none.
        test_owner_names: the natural clients that have test examples.
    """

    name: str
    clients: Mapping[str, Arrays]
    public: Arrays
    validation: Arrays
    test: Arrays
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    preprocess: Preprocess = field(default_factory=Preprocess)
    left_out: Mapping[str, int] = field(default_factory=dict)
    labelled: bool = True
    preparation: Preparation | None = None
    task: Task = None  # type: ignore[assignment]  # __post_init__ gives it one
    columns: tuple[ColumnFacts, ...] = ()
    awaits_statistics: bool = False
    test_owners: Tensor | None = None
    test_owner_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # In a deployment the server's data has no clients, because their data is on other machines.
        # So it is enough if any part has examples.
        if not any(len(arrays) for _, arrays in self._parts()):
            raise DataError(
                "there is no client", place=f"data '{self.name}'", cure="give at least one"
            )
        # The dataclass is frozen, but still under construction.
        if self.task is None:
            object.__setattr__(self, "task", self._default_task())
        # `num_classes` and `class_names` are separate fields, so they may contradict each other.
        if self.num_classes != len(self.class_names):
            raise DataError(
                f"{self.num_classes} classes but {len(self.class_names)} class names",
                place=f"data '{self.name}'",
                cure="give one name per class",
            )
        if self.test_owners is not None and len(self.test_owners) != len(self.test):
            raise DataError(
                f"{len(self.test)} test examples but {len(self.test_owners)} owners",
                place=f"data '{self.name}'",
                cure="give one owner for each test example",
            )
        # Comparing each part with one client suffices: all must have the same shapes and types.
        first = self._first
        for part, arrays in self._parts():
            if part.startswith("client") and len(arrays) == 0:
                raise DataError(
                    f"{part} has no examples",
                    place=f"data '{self.name}'",
                    cure="leave it out or give it some",
                )
            where = f"data '{self.name}': {part}"
            _check_like(where, arrays, first)
            # A task does not know which part it checks, so the part is named here.
            try:
                self.task.check_targets(arrays.y)
            except DataError as error:
                error.place = where
                raise

    def _default_task(self) -> Task:
        y = self._first.y
        if self.class_names or not y.is_floating_point():
            return Classification(self.class_names)
        width = 1 if y.dim() == 1 else y.shape[1]
        if width == 1:
            return Regression(("target",))
        return Regression(tuple(f"target {at}" for at in range(width)))

    def _parts(self) -> Iterator[tuple[str, Arrays]]:
        for name, arrays in self.clients.items():
            yield f"client '{name}'", arrays
        yield "public part", self.public
        yield "validation part", self.validation
        yield "test part", self.test

    @property
    def _first(self) -> Arrays:
        """The examples of the first client; without clients, of the first part with examples."""
        if self.clients:
            return next(iter(self.clients.values()))
        return next(arrays for _, arrays in self._parts() if len(arrays))

    def without_clients(self) -> FederatedData:
        """Returns the data without clients: the public, validation and test parts.

        This is what the server has if the clients are on other machines.

        Raises:
            DataError: if all these parts are empty.
        """
        return replace(self, clients={})

    @property
    def example_shape(self) -> Shape:
        """The shape of one example, such as (3, 32, 32); for named inputs a shape for each name."""
        return shape_of(self._first.x)

    def left_out_sentence(self, *, private: bool) -> str:
        """Returns a sentence with the numbers of rows that were left out; empty if there are none.

        Args:
            private: whether a stage has differential privacy. If so, the sentence does not depend
                on how many rows of clients were left out.
        """
        counts = {part: count for part, count in self.left_out.items() if count}
        # Even "0 rows" would be an exact fact about private rows.
        if private:
            counts.pop("clients", None)
        sentence = ""
        if counts:
            numbers = ", ".join(f"{count:,} of the {part}" for part, count in counts.items())
            # A forecast has no classes: its rows without a target are left out.
            what = (
                "of an unknown class or word"
                if self.class_names
                else "without a target or of an unknown word"
            )
            sentence = f"rows {what} are left out: {numbers}"
        # Without other rows there is nothing to say that depends on the data.
        if sentence and private and "clients" in self.left_out:
            sentence += "; how many of the clients' rows are among them is private"
        return sentence

    def describe(self, *, private: bool = False) -> dict[str, Any]:
        """Returns sizes, classes and label counts per client as plain JSON values.

        Args:
            private: whether a stage has differential privacy. If so, the clients' labels are not
                counted.
        """
        clients: dict[str, dict[str, Any]] = {}
        for name, arrays in self.clients.items():
            clients[name] = {"examples": len(arrays)}
            if not private and (counts := self.label_counts(arrays)):
                clients[name]["labels"] = counts
        left_out = {part: n for part, n in self.left_out.items() if n and part != "clients"}
        columns = {"columns": [asdict(one) for one in self.columns]} if self.columns else {}
        return {
            "name": self.name,
            **columns,
            "shape": _as_json(self.example_shape),
            "task": self.task.kind,
            "classes": list(self.class_names),
            "public": len(self.public),
            "validation": len(self.validation),
            "test": len(self.test),
            "left_out": left_out,
            "private": sum(len(arrays) for arrays in self.clients.values()),
            "clients": clients,
        }

    def label_counts(self, arrays: Arrays) -> list[int]:
        """Returns the number of labels of each class; [] if the targets are not classes."""
        if self.task.targets != "classes":
            return []
        # Positions without a class, such as padding, have negative labels.
        counted = arrays.y[arrays.y >= 0]
        counts: list[int] = counted.bincount(minlength=self.num_classes).tolist()
        return counts


def _as_json(shape: Shape) -> JsonValue:
    """Returns a shape as lists."""
    if isinstance(shape, dict):
        return {name: list(sizes) for name, sizes in shape.items()}
    return list(shape)


def _check_like(where: str, arrays: Arrays, first: Arrays) -> None:
    """Checks that a part has the shapes and types of the part `first`, and finite features.

    Raises:
        DataError: if a shape or type differs, a type is not allowed, or a feature is not finite.
            The error calls the part `where`.
    """
    several = isinstance(arrays.x, NamedInputs)
    allowed = [torch.uint8, torch.float32, torch.int64]
    # Bool is allowed if there are several inputs, because one may be a mask.
    if several:
        allowed.append(torch.bool)
    for name, x in tensors_by_name(arrays.x).items():
        of_name = f" of '{name}'" if several else ""
        if x.dtype not in allowed:
            raise DataError(
                f"examples{of_name} of type {x.dtype}",
                place=where,
                cure="give uint8 images, float32 features or int64 token ids",
            )
    if signature_of(arrays.x) != signature_of(first.x):
        raise DataError(
            f"examples of {inputs_text(arrays.x)}, but the first client has {inputs_text(first.x)}",
            place=where,
            cure="give all parts the same shapes",
        )
    for name, x in tensors_by_name(arrays.x).items():
        if x.is_floating_point() and not all(map(_is_finite, x.split(1 << 14))):
            of_name = f" of '{name}'" if several else ""
            raise DataError(
                f"some features{of_name} are NaN or infinite",
                place=where,
                cure="fill or leave out those rows",
            )


def _is_finite(x: Tensor) -> bool:
    """Returns whether all of some numbers are finite."""
    # A sum over NaN or infinity is not finite, and takes no memory; a sum may overflow, too.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
