"""What a source reads: labelled rows that nobody has been given yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedpress.arrays import Arrays

Progress = Callable[[str, int, int | None], None]
"""`progress(what, done, total)`: told now and then how far a long download or decoding is; total None if unknown."""

Encoder = Callable[[Tensor], Tensor]


def as_is(public: Tensor) -> Encoder:
    """The `fit` of a source whose examples need nothing learned from the public part."""
    return lambda x: x


@dataclass(frozen=True)
class Examples:
    """Rows for training, and for testing where the source has its own test set.

    Attributes:
        name: of the source.
        train: the rows to be shared out.
        class_names: one name per label.
        test: the source's own test rows, or None: then some of `train` are set aside.
        owners: int64 [n], which natural client each training row belongs to, or None.
        owner_names: the names of the natural clients.
        fit: learns an encoder of `x` from the public rows, so that nothing is learned from private ones.
    """

    name: str
    train: Arrays
    class_names: tuple[str, ...]
    test: Arrays | None = None
    owners: Tensor | None = None
    owner_names: tuple[str, ...] = ()
    fit: Callable[[Tensor], Encoder] = as_is
