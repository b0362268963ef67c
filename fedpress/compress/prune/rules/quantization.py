"""Fake quantization, as in networks trained for few bits: each value is rounded by itself."""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("fake_quantize_per_tensor_affine")
def per_tensor(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """One scale for the whole tensor: index i of the output is index i of the input."""
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
    """Scale and zero point have one entry for each index of one axis, and are pruned with it."""
    # A scale that stayed would be applied to another channel.
    ids.unite(x.axes[axis], scale.axes[0])
    ids.unite(x.axes[axis], zero_point.axes[0])
    return x.axes
