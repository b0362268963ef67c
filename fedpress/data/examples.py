"""What a source reads: labelled rows that nobody has been given yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs
from fedpress.data.preparation import Preparation
from fedpress.tasks.base import Targets

Progress = Callable[[str, int, int | None], None]
"""`progress(what, done, total)`: told now and then how far a long download or decoding is; total None if unknown."""


@dataclass(frozen=True)
class TargetRows:
    """The targets of all rows.

    Attributes:
        y: class numbers int64 [n], -1 where a row's label is none of `names`; or float32 [n] or [n, k].
        names: of the classes, or of the k numbers.
        known: bool [n]: which rows have a target; the others are left out.
    """

    y: Tensor
    names: tuple[str, ...]
    known: Tensor

    @classmethod
    def of_classes(cls, y: Tensor, names: tuple[str, ...]) -> TargetRows:
        """Makes those of class numbers."""
        return cls(y, names, y >= 0)


@dataclass(frozen=True)
class InputRows:
    """Examples `x` [n, ...] of all rows, and bool [n]: which of them cannot be used and are to be left out.

    `preparation` says how the raw columns of a table became `x`; None for other sources.
    """

    x: Inputs
    left_out: Tensor
    preparation: Preparation | None = None


@dataclass(frozen=True)
class Examples:
    """Rows for training, and for testing where the source has its own test set.

    What a source reads from private rows must not decide which classes and inputs there are, for these go into the
    model's shape and files. Sources of own data therefore say how both follow from the public rows.

    Attributes:
        name: of the source.
        train: the rows to be shared out. Where `targets` is given, `y` only serves to deal rows by their labels.
        class_names: one name per label, if the source itself decides them; else empty.
        test: the source's own test rows, or None: then some of `train` are set aside.
        owners: int64 [n], which natural client each training row belongs to, or None.
        owner_names: the names of the natural clients.
        targets: learns the targets from the positions int64 [m] of the public rows; None: `train.y`, `class_names`.
        inputs: learns the inputs from the positions of the public rows; None: `train.x` as it is.
        kind: what the targets are: class numbers, 0 and 1 for each name, or numbers.
    """

    name: str
    train: Arrays
    class_names: tuple[str, ...] = ()
    test: Arrays | None = None
    owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    targets: Callable[[Tensor], TargetRows] | None = None
    inputs: Callable[[Tensor], InputRows] | None = None
    kind: Targets = "classes"
