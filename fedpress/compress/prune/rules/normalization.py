"""Normalisation: by each channel's own numbers, by those of a group, or by those of all channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(
    ids: Ids, shape: Shape, x: Value, weight: Value | None, bias: Value | None, *rest: Any
) -> Axes:
    """Each channel is normalised by its own numbers: parameters and statistics go with it.

    What else has channels is averaged over while it trains (weights that are standardised so, tokens): it stays.
    """
    for d, axis in enumerate(x.axes):
        if d != 1:
            ids.keep(axis, "a mean over channels")
    for vector in (weight, bias, *rest[:2]):
        if isinstance(vector, Value):
            ids.unite(x.axes[1], vector.axes[0])
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("group_norm.default")
def group_norm(
    ids: Ids,
    shape: Shape,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *rest: Any,
) -> Axes:
    """Channels of one group share a mean and a variance: only whole groups can go without changing the others."""
    channels = x.axes[1]
    for axis in x.axes[2:]:  # of weights that are standardised so, say
        ids.keep(axis, "a mean over channels")
    if channels is not None and not (groups == 1 and ids.pass_norm("layer_norm", channels)):
        size = len(channels) // groups
        ids.unite(channels, np.repeat(channels[::size], size))
        ids.note_size(0, channels[::size])
    for vector in (weight, bias):
        if vector is not None:
            ids.unite(channels, vector.axes[0])
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("layer_norm.default", "rms_norm.default")
def layer_norm(ids: Ids, shape: Shape, x: Value, normalized: Sequence[int], *rest: Any) -> Axes:
    """All values of the last axes share a mean and a variance: none can go without changing the others.

    Unless that is asked for (`ids.approximate`): then channels go, and the mean is of those that are left.
    """
    if len(normalized) == 1 and ids.pass_norm("layer_norm", x.axes[-1]):
        ids.note_size(0, x.axes[-1])
        for vector in rest[:2]:
            if isinstance(vector, Value):
                ids.unite(x.axes[-1], vector.axes[0])
        return x.axes
    for axis in x.axes[-len(normalized) :]:
        ids.keep(axis, "a mean over channels")
    for vector in rest[:2]:
        for axis in vector.axes if isinstance(vector, Value) else ():
            ids.keep(axis, "a mean over channels")
    return x.axes


@rule("_weight_norm.default")
def weight_norm(ids: Ids, shape: Shape, v: Value, g: Value, dim: int = 0) -> Axes:
    """Divides by norms over all axes but one, to which zeros add nothing; the lengths `g` go with that axis."""
    if dim == -1:
        return v.axes
    for d, axis in enumerate(g.axes):
        if d == dim % len(v.shape):
            ids.unite(axis, v.axes[d])
        else:
            ids.keep(axis, "one length for all")
    return v.axes


@rule("prelu.default")
def prelu(ids: Ids, shape: Shape, x: Value, weight: Value) -> Axes:
    """One slope for all channels, or one per channel that goes with it."""
    if weight.shape[0] > 1:
        ids.unite(x.axes[1], weight.axes[0])
    else:
        ids.keep(weight.axes[0], "one slope for all channels")
    return x.axes
