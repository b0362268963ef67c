"""A federated data set: named clients with private examples, a declared public part, and a test part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedpress.arrays import Arrays, Preprocess
from fedpress.errors import DataError


@dataclass(frozen=True)
class FederatedData:
    """Everything a run learns from and is measured on.

    Attributes:
        name: where the data came from, for the report.
        clients: private examples by client name, in a fixed order.
        public: training examples declared public (may have no rows), without the validation set.
        validation: a part taken from the public one; every choice is made on it.
        test: used once at the end of each stage.
        num_classes: labels are 0 .. num_classes - 1.
        class_names: one name per class.
        preprocess: from raw examples to the input of a network; fitted on `public` only, never on private data.
    """

    name: str
    clients: Mapping[str, Arrays]
    public: Arrays
    validation: Arrays
    test: Arrays
    num_classes: int
    class_names: tuple[str, ...]
    preprocess: Preprocess

    def __post_init__(self) -> None:
        if not self.clients:
            raise DataError(f"data '{self.name}': there is no client; give at least one")
        if self.num_classes != len(self.class_names):
            raise DataError(
                f"data '{self.name}': {self.num_classes} classes but {len(self.class_names)} class names; "
                "give one name per class"
            )
        first = next(iter(self.clients.values()))
        for part, arrays in self._parts():
            if part.startswith("client") and len(arrays) == 0:
                raise DataError(f"data '{self.name}': {part} has no examples; leave it out or give it some")
            _check_like(f"data '{self.name}': {part}", arrays, first, self.num_classes)

    def _parts(self) -> Iterator[tuple[str, Arrays]]:
        yield from ((f"client '{name}'", arrays) for name, arrays in self.clients.items())
        yield from (("public part", self.public), ("validation part", self.validation), ("test part", self.test))

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example, such as (3, 32, 32)."""
        return tuple(next(iter(self.clients.values())).x.shape[1:])

    def describe(self) -> dict[str, Any]:
        """Returns sizes, classes and label counts per client as plain JSON values."""
        return {
            "name": self.name,
            "shape": list(self.example_shape),
            "classes": list(self.class_names),
            "public": len(self.public),
            "validation": len(self.validation),
            "test": len(self.test),
            "private": sum(len(arrays) for arrays in self.clients.values()),
            "clients": {
                name: {"examples": len(arrays), "labels": arrays.y.bincount(minlength=self.num_classes).tolist()}
                for name, arrays in self.clients.items()
            },
        }


def _check_like(where: str, arrays: Arrays, first: Arrays, num_classes: int) -> None:
    """Checks that a part looks like the `first` client's: a network sees them all."""
    if arrays.x.dtype not in (torch.uint8, torch.float32):
        raise DataError(f"{where}: examples of type {arrays.x.dtype}; give uint8 images or float32 features")
    if arrays.x.shape[1:] != first.x.shape[1:] or arrays.x.dtype != first.x.dtype:
        raise DataError(
            f"{where}: examples of {tuple(arrays.x.shape[1:])} {arrays.x.dtype} where the first client has "
            f"{tuple(first.x.shape[1:])} {first.x.dtype}; make them all alike"
        )
    if arrays.x.is_floating_point() and not bool(arrays.x.isfinite().all()):
        raise DataError(f"{where}: some features are NaN or infinite; fill or leave out those rows")
    if arrays.y.dtype != torch.int64 or arrays.y.dim() != 1:
        raise DataError(f"{where}: labels of type {arrays.y.dtype} and {arrays.y.dim()} dimensions; give int64 [n]")
    low, high = (int(arrays.y.min()), int(arrays.y.max())) if len(arrays) else (0, 0)
    if low < 0 or high >= num_classes:
        raise DataError(f"{where}: labels from {low} to {high}; expected 0 to {num_classes - 1}")
