"""Pruning rules of fake quantization, which rounds values in quantization-aware training.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, and returns the ids of the output's axes. Its argument `shape` is the shape of the output.
"""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("fake_quantize_per_tensor_affine")
def per_tensor(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Fake quantization with one scale for the tensor: the output has the ids of the input."""
    return x.axes


@rule("fake_quantize_per_channel_affine")
def per_channel(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    scale: Value,
    zero_point: Value,
    axis: int,
    *rest: Any,
) -> Axes:
    """Fake quantization with a scale and a zero point for each index of `axis`.

    A scale and a zero point are pruned with their index.
    """
    # Otherwise the remaining scales would be applied to the wrong channels.
    ids.unite(x.axes[axis], scale.axes[0])
    ids.unite(x.axes[axis], zero_point.axes[0])
    return x.axes
