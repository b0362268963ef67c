"""The rows that were read from a data source, before they are divided among clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs
from fedpress.data.column_facts import ColumnFacts
from fedpress.data.preparation import Preparation
from fedpress.tasks.base import Targets

Progress = Callable[[str, int, int | None], None]
"""`progress(what, done, total)` is called during downloads and decoding; total may be None."""


@dataclass(frozen=True)
class TargetRows:
    """The targets of all rows.

    Attributes:
        y: class numbers int64 [n], with -1 for a label that is not in `names`; or int64 [n, ...]
            with a class for each position, such as a pixel; or numbers float32 [n] or [n, k].
        names: names of the classes, or of the k numbers of each row.
        known: bool [n]: whether a row has a valid target; other rows are dropped.
    """

    y: Tensor
    names: tuple[str, ...]
    known: Tensor

    @classmethod
    def of_classes(cls, y: Tensor, names: tuple[str, ...]) -> TargetRows:
        """Makes the targets from class numbers, where -1 means an unknown class."""
        return cls(y, names, y >= 0)


@dataclass(frozen=True)
class InputRows:
    """The inputs of all rows.

    Attributes:
        x: the inputs [n, ...].
        left_out: bool [n]: whether a row cannot be used and is dropped.
        preparation: how raw data became `x`; None if the source does not say it.
    """

    x: Inputs
    left_out: Tensor
    preparation: Preparation | None = None

    def of_parts(self, parts: Mapping[str, Tensor]) -> Mapping[str, Inputs]:
        """Returns the inputs of each part, from the positions of its rows."""
        return {name: self.x[rows] for name, rows in parts.items()}


@dataclass(frozen=True)
class SourceRows:
    """Rows for training, and for testing if the source has its own test set.

    Classes and inputs decide the shape of the model, which everybody sees. So only public rows may
    decide them. Which rows are public is known only after the split. Therefore `targets` and
    `inputs` are functions, which are called after the split.

    Attributes:
        name: name of the source.
        train: the rows to split. If `targets` is given, `train.y` is only used for dividing rows
            among clients.
        class_names: one name per label, if the source decides the classes; else empty.
        test: the source's own test rows; None: some rows of `train` become the test set.
        owners: int64 [n]: the client to which a training row naturally belongs, such as a hospital,
            as a position in `owner_names`; None if the source names no clients.
        owner_names: names of the natural clients.
        targets: maps the positions int64 [m] of the public rows to the targets of all rows; None:
            the targets are `train.y` and `class_names`.
        inputs: maps the positions of the public rows to the inputs of all rows; None: the inputs
            are `train.x`.
        kind: kind of the targets: "classes", "flags" (0 or 1 for each name) or "numbers".
        default_task: name of the task if the recipe names none; None: it follows from `kind`.
        is_test: bool [n]: whether a row of `train` belongs to the source's own test set. Such a
            row is only used for testing. None: the source has no test set, or `test` holds it.
        spans: int64 [n, 3]: series, first and last + 1 of the readings that an example holds, if
            examples are windows over series (`Windows.spans`). Such examples are split by time.
        facts: describes the columns of a table by some rows of `train`, given by their positions,
            or by all rows that were read (None); None: the source is no table.
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
    default_task: str | None = None
    is_test: Tensor | None = None
    spans: Tensor | None = None
    facts: Callable[[Tensor | None], tuple[ColumnFacts, ...]] | None = None
