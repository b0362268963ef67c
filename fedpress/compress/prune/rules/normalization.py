"""Pruning rules of normalisation layers: per channel, over groups of channels, or over all.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, keeps the ids of channels that cannot be pruned, and returns the ids of the output's axes.
Its argument `shape` is the shape of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import ChannelIds, Value
from fedpress.compress.prune.rules.table import Axes, Shape, rule, values_among

MEAN = "a mean over channels"
"""Reason why channels are kept: a norm averages over them."""


@rule("batch_norm.default", "instance_norm.default")
def batch_norm(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    *rest: Any,
) -> Axes:
    """Batch norm: statistics, scale and shift of a channel are pruned with the channel.

    Ids on other axes than 1 are kept, because training averages over these axes. Such ids occur
    where a batch norm is applied to weights (weight standardisation) or to tokens.
    """
    for d, axis in enumerate(x.axes):
        if d != 1:
            ids.keep(axis, MEAN)
    for vector in values_among((weight, bias, *rest[:2])):  # `rest` begins with mean and variance
        ids.unite(x.axes[1], vector.axes[0])
    # Scores such as `bn_scale` read the parameter with the role "scale".
    if weight is not None:
        ids.mark_role(weight.axes[0], "scale")
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
    """Group norm: channels of a group share mean and variance, so only whole groups are pruned.

    With a single group it is a layer norm over channels, which `approximate` may allow to prune.
    """
    channels = x.axes[1]
    # If the norm standardises a weight, these axes have channels too.
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
        ids.mark_role(weight.axes[0], "scale")
    return x.axes


@rule("layer_norm.default", "rms_norm.default")
def layer_norm(
    ids: ChannelIds, shape: Shape, x: Value, normalized: Sequence[int], *rest: Any
) -> Axes:
    """Layer norm: all channels share mean and variance, so all are kept by default.

    If the user allows it (`ids.approximate`) and the norm covers a single axis, channels can be
    pruned; mean and variance are then those of the remaining channels.
    """
    # Scale and shift, if the norm has them.
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
    """Weight norm, g * v / norm(v), with a length `g` for each index of axis `dim`.

    With dim = -1 there is a single length. The parity check sets pruned weights to 0. They add
    nothing to the norm, so all axes can lose channels (Salimans and Kingma 2016, arXiv:1602.07868).
    """
    # A single length has no axis to unite with.
    if dim == -1:
        return v.axes
    dim %= len(v.shape)
    for d, axis in enumerate(g.axes):
        if d == dim:
            ids.unite(axis, v.axes[d])
        else:
            ids.keep(axis, "one length for all channels")
    return v.axes


@rule("prelu.default")
def prelu(ids: ChannelIds, shape: Shape, x: Value, weight: Value) -> Axes:
    """PReLU with one slope for all channels, or a slope per channel, pruned with its channel."""
    # torch tells the two cases apart by the size of the weight, so a single slope must stay.
    if weight.shape[0] > 1:
        ids.unite(x.axes[1], weight.axes[0])
    else:
        ids.keep(weight.axes[0], "one slope for all channels")
    return x.axes
