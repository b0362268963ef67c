"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: real data without a download."""

from __future__ import annotations

import torch

from fedpress.core.examples import Arrays
from fedpress.data.examples import Examples


def read() -> Examples:
    """Returns uint8 images [1797, 1, 8, 8]; the 0..16 of the original is stretched to 0..255.

    Source: UCI "Optical recognition of handwritten digits", Alpaydin and Kaynak 1998.
    """
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    return Examples("digits", Arrays(x, torch.from_numpy(labels).long()), tuple("0123456789"))
