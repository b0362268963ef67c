"""Rules of fake quantization, which rounds each value in quantization-aware training."""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("fake_quantize_per_tensor_affine")
def per_tensor(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """One scale for the whole tensor: all ids pass through."""
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
    """One scale and zero point for each index of `axis`: they are pruned with it."""
    # Otherwise the remaining scales would be applied to the wrong channels.
    ids.unite(x.axes[axis], scale.axes[0])
    ids.unite(x.axes[axis], zero_point.axes[0])
    return x.axes
