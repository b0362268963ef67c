"""What 23 people do, from the accelerometer and gyroscope of a phone and a watch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import nn

WINDOW, STRIDE = 128, 64
"""Samples of a window, and between the starts of two windows: 128 samples are about 2.5 seconds."""
CHANNELS = ("x_acc", "y_acc", "z_acc", "x_gyro", "y_gyro", "z_gyro")
SCALE = np.array([9.81] * 3 + [2.0] * 3, np.float32)
"""Accelerations in units of gravity; rotations in units of 2 radians a second."""


def people(path: Path | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns person -> (windows [n, 6, WINDOW], what most of each window shows [n]).

    No window spans two recordings or two devices.

    Args:
        path: the folder with `har.parquet`.
    """
    import pyarrow.parquet as parquet

    folder = Path("phone_watch_har") if path is None else path
    table = parquet.read_table(folder / "har.parquet")
    signal = np.stack([table[name].to_numpy() for name in CHANNELS], 1) / SCALE
    person, device, label = (table[name].to_numpy() for name in ("subject", "device", "label"))
    recording = table["execution"].to_numpy()
    # A new series begins where any of the three changes.
    same = (person[1:] == person[:-1]) & (device[1:] == device[:-1])
    same &= recording[1:] == recording[:-1]
    edges = [0, *(np.flatnonzero(~same) + 1), len(person)]
    found: dict[str, tuple[list[np.ndarray], list[str]]] = {}
    for begin, end in pairwise(edges):
        windows, labels = found.setdefault(str(person[begin]), ([], []))
        for at in range(begin, end - WINDOW + 1, STRIDE):
            names, counts = np.unique(label[at : at + WINDOW], return_counts=True)
            windows.append(signal[at : at + WINDOW].T)
            labels.append(str(names[counts.argmax()]))
    return {
        name: (np.stack(windows).astype(np.float32), np.array(labels))
        for name, (windows, labels) in sorted(found.items())
        if windows
    }


def network(width: int = 16, num_classes: int = 5) -> nn.Module:
    """Returns a 1-D convolutional network for windows [n, 6, WINDOW]."""
    layers: list[nn.Module] = []
    channels = len(CHANNELS)
    for wide in (width, 2 * width, 4 * width):
        layers += [nn.Conv1d(channels, wide, 5, padding=2), nn.GroupNorm(4, wide), nn.ReLU()]
        layers += [nn.MaxPool1d(2)]
        channels = wide
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
