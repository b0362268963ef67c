"""The 1,797 handwritten digits (8x8 pixels) of scikit-learn: real data without a download."""

from __future__ import annotations

import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.data.examples import SourceRows


def read_digits() -> SourceRows:
    """Returns uint8 images [1797, 1, 8, 8]; their values 0..16 are scaled to 0..255.

    Source: UCI "Optical recognition of handwritten digits", Alpaydin and Kaynak 1998.
    """
    x, labels = _digits()
    # Copies, because the tensors are cached and the caller may change them.
    return SourceRows("digits", Arrays(x.clone(), labels.clone()), tuple("0123456789"))


# Reading the text file takes longer than training a small network for an epoch.
@cache
def _digits() -> tuple[Tensor, Tensor]:
    table = _table()
    x = torch.from_numpy(table[:, :-1]).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    return x, torch.from_numpy(table[:, -1]).long()


def _table() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Returns scikit-learn's table, float64 [1797, 65]: 64 pixels (0..16), then the label."""
    # The file is read without scikit-learn, whose import (with scipy.stats and pandas) takes about
    # as long as that of torch. `find_spec` finds the package without importing it.
    spec = find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as text:
                return np.loadtxt(text, delimiter=",")
    # A version of scikit-learn that keeps the file elsewhere, or an error that names the package.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])
