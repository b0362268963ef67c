"""Normalisation: over each channel by itself, over groups of channels, or over all channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule, values_among

MEAN = "a mean over channels"


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    *rest: Any,
) -> Axes:
    """Each channel has its own statistics, which are pruned with it, as are its scale and shift.

    Channels on another axis than 1 are kept: in training they are averaged over. That is so where a
    batch norm standardises weights, or normalises tokens.
    """
    for d, axis in enumerate(x.axes):
        if d != 1:
            ids.keep(axis, MEAN)
    for vector in values_among((weight, bias, *rest[:2])):  # `rest` begins with mean and variance
        ids.unite(x.axes[1], vector.axes[0])
    # Scores such as `bn_scale` look at this scale.
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("group_norm.default")
def group_norm(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *rest: Any,
) -> Axes:
    """Channels of a group share mean and variance: only whole groups can be pruned exactly.

    A group norm of one group is a layer norm over channels, which the user may allow to prune
    through.
    """
    channels = x.axes[1]
    # Standardised weights have channels on these axes too.
    ids.keep_all(x.axes[2:], MEAN)
    if channels is not None:
        is_layer_norm = groups == 1
        if not (is_layer_norm and ids.may_prune_through("layer_norm", channels)):
            size = len(channels) // groups
            first_of_group = channels[::size]
            ids.unite(channels, np.repeat(first_of_group, size))
            ids.note_size(0, first_of_group)  # the number of groups
    for vector in values_among((weight, bias)):
        ids.unite(channels, vector.axes[0])
    if weight is not None:
        ids.mark(weight.axes[0], "scale")
    return x.axes


@rule("layer_norm.default", "rms_norm.default")
def layer_norm(
    ids: ChannelIds, shape: Shape, x: Value, normalized: Sequence[int], *rest: Any
) -> Axes:
    """All values of the last axes share mean and variance, which change if one value is pruned.

    Only where the user allows it (`ids.approximate`) can channels be pruned; the statistics are
    then those of the channels that are left.
    """
    parameters = values_among(rest[:2])
    if len(normalized) == 1 and ids.may_prune_through("layer_norm", x.axes[-1]):
        ids.note_size(0, x.axes[-1])
        for vector in parameters:
            ids.unite(x.axes[-1], vector.axes[0])
        return x.axes
    ids.keep_all(x.axes[-len(normalized) :], MEAN)
    for vector in parameters:
        ids.keep_all(vector.axes, MEAN)
    return x.axes


@rule("_weight_norm.default")
def weight_norm(ids: ChannelIds, shape: Shape, v: Value, g: Value, dim: int = 0) -> Axes:
    """Weight = g * v / norm(v), with a length `g` for each index of axis `dim`, or one (-1).

    The norm is over masked weights, to which zeros add nothing, so all axes can lose channels
    (Salimans and Kingma 2016, arXiv:1602.07868).
    """
    # One length for all has no axis that could meet a channel.
    if dim == -1:
        return v.axes
    dim %= len(v.shape)
    for d, axis in enumerate(g.axes):
        if d == dim:
            ids.unite(axis, v.axes[d])
        else:
            ids.keep(axis, "one length for all")
    return v.axes


@rule("prelu.default")
def prelu(ids: ChannelIds, shape: Shape, x: Value, weight: Value) -> Axes:
    """One slope for all channels, or one for each channel, which is pruned with it."""
    # A single slope belongs to no channel, and torch tells the two cases apart by its size.
    if weight.shape[0] > 1:
        ids.unite(x.axes[1], weight.axes[0])
    else:
        ids.keep(weight.axes[0], "one slope for all channels")
    return x.axes
