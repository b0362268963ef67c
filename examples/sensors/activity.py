"""A small network for windows of a phone's or a watch's movements."""

from __future__ import annotations

from torch import nn

CHANNELS = 6
"""Acceleration and rotation, each in three directions."""


def network(width: int = 16, num_classes: int = 5) -> nn.Module:
    """Returns a 1-D convolutional network for windows [n, CHANNELS, 256].

    The last layer sees four quarters of the window, so it can tell what comes last.
    """
    layers: list[nn.Module] = []
    channels = CHANNELS
    for wide in (width, 2 * width, 4 * width):
        layers += [nn.Conv1d(channels, wide, 5, stride=2, padding=2), nn.BatchNorm1d(wide)]
        layers += [nn.ReLU(), nn.MaxPool1d(2)]
        channels = wide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, num_classes))
