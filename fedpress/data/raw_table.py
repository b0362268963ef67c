"""A table as it was read, before its columns become examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedpress.errors import DataError


@dataclass(frozen=True)
class RawTable:
    """A table as it was read.

    Attributes:
        name: name of the data, for the report.
        values: a `pyarrow.Table`.
        where: file, folder or database, for errors.
        is_test: bool [n]: whether a row belongs to the source's own test set; None: the source has
            none.
    """

    name: str
    values: Any
    where: str
    is_test: Tensor | None = None

    def filtered(self, mask: Any) -> RawTable:
        """Returns the rows where `mask`, a pyarrow array of booleans [n], is true."""
        kept = torch.from_numpy(mask.to_numpy(zero_copy_only=False).astype(bool))
        return RawTable(
            self.name,
            self.values.filter(mask),
            self.where,
            None if self.is_test is None else self.is_test[kept],
        )


def refuse_equal_names(names: Sequence[str], where: str) -> None:
    """Checks that all columns have different names.

    Raises:
        DataError: if two columns have the same name.
    """
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(
            f"two columns are named '{twice[0]}'", place=where, cure="give each a different name"
        )
