"""Chest X-rays of five hospitals (PneumoniaMNIST): who has pneumonia."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

FILE = "pneumoniamnist.npz"
PARTS = ("train", "val", "test")
LABELS = ("healthy", "pneumonia")
PUBLISHED = 240
"""X-rays that everybody may see: for the first training, the cut, and choices."""
SHARES = {
    "university": (0.20, 0.34),
    "city": (0.35, 0.26),
    "children": (0.15, 0.20),
    "district": (0.30, 0.12),
    "lung clinic": (0.0, 0.08),
}
"""Hospital -> its share of the healthy, and of the ill.

The data set does not say where an X-ray was taken. These shares make hospitals of uneven size and
prevalence. The lung clinic only sees the ill: it has one class and cannot learn alone.
"""


def hospitals(path: Path | None = None, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns hospital -> (X-rays uint8 [n, 1, 28, 28], "pneumonia" or "healthy" [n]).

    Two more clients are `PUBLISHED` X-rays of the data set's validation set, and its test set.

    Args:
        path: the folder with `pneumoniamnist.npz`.
        seed: says which X-rays a hospital has; how many ill and healthy it has does not change.
    """
    folder = Path("pneumonia_mnist") if path is None else path
    with np.load(folder / FILE) as file:
        train, validation, test = (
            [file[f"{part}_images"], file[f"{part}_labels"]] for part in PARTS
        )
    chance = np.random.default_rng(seed)
    order = chance.permutation(len(validation[0]))
    published = [array[order[:PUBLISHED]] for array in validation]
    x, y = (
        np.concatenate([a, b[order[PUBLISHED:]]]) for a, b in zip(train, validation, strict=True)
    )
    found = {name: (x[rows], y[rows]) for name, rows in _dealt(y, chance).items()}
    found |= {"published": tuple(published), "test": tuple(test)}
    return {name: (x[:, None], np.array(LABELS)[y[:, 0]]) for name, (x, y) in found.items()}


def _dealt(label: np.ndarray, chance: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns hospital -> positions of its X-rays."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in SHARES}
    for value in range(2):
        shuffled = chance.permutation(np.flatnonzero(label == value))
        ends = np.cumsum([share[value] for share in SHARES.values()]) * len(shuffled)
        parts = np.split(shuffled, ends.round().astype(int)[:-1])
        for name, part in zip(SHARES, parts, strict=True):
            rows[name].append(part)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def network(width: int = 16, num_classes: int = 1) -> nn.Module:
    """Returns a convolutional network with group norms for X-rays [n, 1, 28, 28]."""
    layers: list[nn.Module] = []
    channels = 1
    for wide in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.GroupNorm(4, wide), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = wide
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
