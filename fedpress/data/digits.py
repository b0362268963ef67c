"""The 1,797 handwritten digits (8x8 pixels) of scikit-learn: real data without a download."""

from __future__ import annotations

from functools import cache

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
    # Imported here, because scikit-learn is slow to import and no other source needs it.
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    return x, torch.from_numpy(labels).long()
