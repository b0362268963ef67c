"""A federated data set: named clients with private examples, a declared public part, and a test part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import JsonValue

from fedpress.core.examples import Arrays, Preprocess
from fedpress.core.inputs import NamedInputs, Shape, form_of, parts_of, shape_of, told
from fedpress.data.preparation import Preparation
from fedpress.errors import DataError
from fedpress.tasks import Classification, Regression, Task


@dataclass(frozen=True)
class FederatedData:
    """Everything a run learns from and is measured on.

    Attributes:
        name: where the data came from, for the report.
        clients: private examples by client name, in a fixed order.
        public: training examples declared public (may have no rows), without the validation set.
        validation: a part taken from the public one; every choice is made on it.
        test: used once at the end of each stage.
        num_classes: labels are 0 .. num_classes - 1; 0 where the task has no classes.
        class_names: one name per class.
        preprocess: from raw examples to the input of a network; fitted on `public` only, never on private data.
        left_out: how many rows are in no part because their label or a word of theirs is unknown, by "public",
            "validation", "test", and "clients" for all clients together, which is a private number; empty where the
            source names all classes itself.
        labelled: whether `y` means anything; False for inputs alone, which serve to calibrate and to compare.
        preparation: how raw rows of a table become inputs; None where the examples come from no table. It goes out
            with files for devices, so it holds what was declared or learned from public rows alone.
        task: what is learned; by default a classification if there are classes, and a regression of float targets in
            their own units.
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

    def __post_init__(self) -> None:
        if not self.clients:
            raise DataError(
                "there is no client", place=f"data '{self.name}'", cure="give at least one"
            )
        if self.task is None:
            object.__setattr__(self, "task", self._default_task())
        if self.num_classes != len(self.class_names):
            raise DataError(
                f"{self.num_classes} classes but {len(self.class_names)} class names",
                place=f"data '{self.name}'",
                cure="give one name per class",
            )
        first = next(iter(self.clients.values()))
        for part, arrays in self._parts():
            if part.startswith("client") and len(arrays) == 0:
                raise DataError(
                    f"{part} has no examples",
                    place=f"data '{self.name}'",
                    cure="leave it out or give it some",
                )
            where = f"data '{self.name}': {part}"
            _check_like(where, arrays, first)
            try:
                self.task.check_targets(arrays.y)
            except DataError as error:
                error.place = where
                raise

    def _default_task(self) -> Task:
        y = next(iter(self.clients.values())).y
        if self.class_names or not y.is_floating_point():
            return Classification(self.class_names)
        width = 1 if y.dim() == 1 else y.shape[1]
        return Regression(
            tuple(f"target {at}" for at in range(width)) if width > 1 else ("target",)
        )

    def _parts(self) -> Iterator[tuple[str, Arrays]]:
        yield from ((f"client '{name}'", arrays) for name, arrays in self.clients.items())
        yield from (
            ("public part", self.public),
            ("validation part", self.validation),
            ("test part", self.test),
        )

    @property
    def example_shape(self) -> Shape:
        """The shape of one example, such as (3, 32, 32); of several inputs one for each name."""
        return shape_of(next(iter(self.clients.values())).x)

    def left_out_sentence(self, *, private: bool) -> str:
        """Says how many rows were left out since their label or a word of theirs is unknown; empty if none.

        Args:
            private: whether something is promised about the clients' rows: then their number is not told, and it is
                said whether or not there are any.
        """
        counts = {part: count for part, count in self.left_out.items() if count}
        if private:
            counts.pop("clients", None)
        told = ", ".join(f"{count:,} of the {part}" for part, count in counts.items())
        said = f"rows of an unknown class or word are left out: {told}" if told else ""
        if private and "clients" in self.left_out:
            said = said or "rows of an unknown class or word are left out"
            said += "; how many of the clients' rows are among them is private"
        return said

    def describe(self, *, private: bool = False) -> dict[str, Any]:
        """Returns sizes, classes and label counts per client as plain JSON values.

        Args:
            private: whether something is promised about the clients' rows: then their labels are not counted.
        """
        return {
            "name": self.name,
            "shape": _as_json(self.example_shape),
            "task": self.task.kind,
            "classes": list(self.class_names),
            "public": len(self.public),
            "validation": len(self.validation),
            "test": len(self.test),
            "left_out": {
                part: count for part, count in self.left_out.items() if count and part != "clients"
            },
            "private": sum(len(arrays) for arrays in self.clients.values()),
            "clients": {
                name: {"examples": len(arrays)} | ({} if private else self._counted(arrays))
                for name, arrays in self.clients.items()
            },
        }

    def _counted(self, arrays: Arrays) -> dict[str, Any]:
        """Says how often each class occurs; nothing where targets are no class numbers."""
        if self.task.targets != "classes":
            return {}
        counted = arrays.y[arrays.y >= 0]  # padding is none of the classes
        return {"labels": counted.bincount(minlength=self.num_classes).tolist()}


def _as_json(shape: Shape) -> JsonValue:
    """Returns a shape as lists."""
    if isinstance(shape, dict):
        return {name: list(sizes) for name, sizes in shape.items()}
    return list(shape)


def _check_like(where: str, arrays: Arrays, first: Arrays) -> None:
    """Checks that a part looks like the `first` client's: a network sees them all."""
    several = isinstance(arrays.x, NamedInputs)
    for name, x in parts_of(arrays.x).items():
        of_name = f" of '{name}'" if several else ""
        if x.dtype not in (torch.uint8, torch.float32, torch.int64, *[torch.bool] * several):
            raise DataError(
                f"examples{of_name} of type {x.dtype}",
                place=where,
                cure="give uint8 images, float32 features or int64 token ids",
            )
    if form_of(arrays.x) != form_of(first.x):
        raise DataError(
            f"examples of {told(arrays.x)} where the first client has {told(first.x)}",
            place=where,
            cure="make them all alike",
        )
    for name, x in parts_of(arrays.x).items():
        if x.is_floating_point() and not bool(x.isfinite().all()):
            of_name = f" of '{name}'" if several else ""
            raise DataError(
                f"some features{of_name} are NaN or infinite",
                place=where,
                cure="fill or leave out those rows",
            )
