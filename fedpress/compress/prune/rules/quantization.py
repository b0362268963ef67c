"""Fake quantization, as networks have it that were trained for few bits: each value is rounded by itself."""

from __future__ import annotations

from typing import Any

from fedpress.compress.prune.ids import Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule, tie


@rule("fake_quantize_per_tensor_affine")
def per_tensor(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """One scale for all: what goes in comes out at the same index."""
    return x.axes


@rule("fake_quantize_per_channel_affine")
def per_channel(
    ids: Ids, shape: Shape, x: Value, scale: Value, zero_point: Value, axis: int, *rest: Any
) -> Axes:
    """A scale and a zero point for each index of one axis: they go with its channels."""
    for own in (scale, zero_point):
        tie(ids, x.axes[axis], own.axes[0])
    return x.axes
