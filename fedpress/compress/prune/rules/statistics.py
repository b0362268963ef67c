"""Pruning rules of sums, means, softmax, sorting and linear algebra.

These operations mix values along some axes. Channels along these axes are kept, that is, they
cannot be pruned. Exceptions are norms of weights, and norms that the user allows to change
(`approximate`). Each index of a channel axis has an id. Ids of channels that must be pruned
together are united. A rule returns the ids of the output's axes; its argument `shape` is the shape
of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpress.compress.prune.ids import Axis, ChannelIds, Value
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    arguments_by_name,
    elementwise,
    replace_entry,
    rule,
    values_among,
    without_last_axes,
)

UNCHANGED_BY_ZEROS = ("sum", "linalg_vector_norm", "norm")
"""Statistics that additional zeros do not change."""
MEANS = ("mean", "var", "std", "var_mean", "std_mean")
"""Statistics that hand-written normalisation layers consist of."""
STATISTIC = "a statistic over channels"
"""Reason why channels are kept: the operation reduces them to one value."""
MIXED = "values are mixed across channels"
"""Reason why channels are kept: an output channel depends on several input channels."""


@rule(
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "cummax",
    "cummin",
    "logcumsumexp",
)
@rule(
    "roll",
    "argsort",
    "sort",
    "msort",
    "topk",
    "kthvalue",
    "argmax",
    "argmin",
    "max",
    "min",
    "aminmax",
)
@rule(
    "mean",
    "sum",
    "prod",
    "var",
    "std",
    "amax",
    "amin",
    "linalg_vector_norm",
    "norm",
    "var_mean",
    "std_mean",
)
@rule(
    "logsumexp",
    "median.dim",
    "nanmedian.dim",
    "mode",
    "any",
    "all",
    "nansum",
    "count_nonzero",
    "tril",
    "triu",
)
def mix_along_axes(ids: ChannelIds, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Operations that mix, count or move values along some axes: the ids of these axes are kept.

    They are not kept in three cases: in sums and norms of weights, because the parity check sets
    pruned weights to 0, which adds nothing; in statistics of hand-written norms, if the user allows
    it (`approximate`); and if no output depends on the operation.
    """
    rank = len(x.shape)
    name = ids.operation.split(".")[1]
    dims = _dims(ids, x, rest, options)
    others: list[Axis] = list(x.axes)
    for d in dims:
        others[d] = None
    keeps_rank = len(shape) == rank

    # A mean that keeps its axis (with size 1) is part of a hand-written norm, for instance
    # x - x.mean(1, keepdim=True).
    if name in MEANS and keeps_rank and not x.from_weights:
        # Global response norm divides the norm of each channel by the mean of these norms.
        kind = "grn" if x.channel_norm else "layer_norm"
        if any(ids.may_prune_through(kind, x.axes[d]) for d in dims):
            return tuple(others)

    # If no output depends on this operation, its values may change: it only has to run.
    adds_nothing = x.zero_when_masked and name in UNCHANGED_BY_ZEROS
    if ids.is_used and not adds_nothing:
        reduces = not keeps_rank or _has_argument(ids, "keepdim")
        why = STATISTIC if reduces else MIXED
        for d in dims:
            ids.keep(x.axes[d], why)
    if keeps_rank:
        return tuple(others)
    for d in sorted(dims, reverse=True):
        del others[d]
    return tuple(others)


def _has_argument(ids: ChannelIds, name: str) -> bool:
    # Reductions have `keepdim`; operations such as softmax do not.
    names = [argument.name for argument in ids.target._schema.arguments]
    return name in names


def _dims(ids: ChannelIds, x: Value, rest: Any, options: Any) -> set[int]:
    """Returns the axes of `x` that the operation works on: its argument `dim`, or all axes."""
    rank = len(x.shape)
    name = ids.operation.split(".")[1]
    # These have no argument `dim`: their axes are fixed.
    if name in ("tril", "triu"):
        return {rank - 2, rank - 1}
    if name == "msort":
        return {0}
    given = arguments_by_name(ids, [x, *rest], options)
    # ATen calls the argument `dim` in some operations, `dims` in others.
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return set(range(rank))
    if not rank:
        return set()
    if not isinstance(dims, list | tuple):
        dims = [dims]
    return {d % rank for d in dims}


@rule("quantile", "nanquantile")
def quantile(ids: ChannelIds, shape: Shape, x: Value, q: Any, *rest: Any, **options: Any) -> Axes:
    """Quantiles along one axis, or over all; several quantiles make a new first axis."""
    # A single quantile is a 0-d tensor.
    several = isinstance(q, Value) and len(q.shape) == 1
    # The new axis comes first, so the general rule gets the shape without it.
    if not several:
        return mix_along_axes(ids, shape, x, q, *rest, **options)
    return (None, *mix_along_axes(ids, shape[1:], x, q, *rest, **options))


@rule("cosine_similarity", "linalg_cross")
def compare_pairs(
    ids: ChannelIds, shape: Shape, x: Value, y: Value, *rest: Any, **options: Any
) -> Axes:
    """Cosine similarity and cross product: axis `dim` is kept, all other axes are united."""
    rank = max(len(x.shape), len(y.shape))
    dim = arguments_by_name(ids, [x, y, *rest], options)["dim"] % rank
    for value in (x, y):
        # `dim` counts the axes after broadcasting; a tensor of lower rank may not have this axis.
        own_dim = dim - rank + len(value.shape)
        if own_dim >= 0:
            ids.keep(value.axes[own_dim], STATISTIC)

    x_shape = _to_rank(x.shape, rank)
    y_shape = _to_rank(y.shape, rank)
    # The mixed axis is in this shape too: it is dropped from the result below.
    broadcast = tuple(max(a, b) for a, b in zip(x_shape, y_shape, strict=True))
    axes = elementwise(ids, broadcast, x, y)
    if len(shape) == rank:
        return axes
    return replace_entry(axes, dim)


def _to_rank(shape: Shape, rank: int) -> Shape:
    return (1,) * (rank - len(shape)) + shape


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(
    ids: ChannelIds, shape: Shape, x: Value, y: Value, *rest: Any, **options: Any
) -> Axes:
    """`cdist`: distances [..., n, m] between [..., n, channels] and [..., m, channels].

    The channels are kept, because a distance sums over them.
    """
    ids.keep_all([x.axes[-1], y.axes[-1]], STATISTIC)
    batch = elementwise(ids, shape[:-2], without_last_axes(x, 2), without_last_axes(y, 2))
    return (*batch, x.axes[-2], y.axes[-2])


@rule(
    "linalg_inv_ex",
    "linalg_cholesky_ex",
    "linalg_qr",
    "linalg_matrix_exp",
    "linalg_eigh",
    "linalg_eig",
)
@rule(
    "linalg_solve_triangular",
    "_linalg_svd",
    "_linalg_det",
    "_linalg_slogdet",
    "_linalg_solve_ex",
    "_linalg_eigh",
)
@rule(
    "linalg_lu_factor_ex",
    "linalg_ldl_factor_ex",
    "linalg_lstsq",
    "linalg_pinv.atol_rtol_tensor",
    "linalg_lu",
)
@rule("cholesky_inverse", "cholesky_solve", "linalg_householder_product", "geqrf", "cholesky")
def linear_algebra(ids: ChannelIds, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Linear algebra on the last two axes, which are kept; the axes before them are a batch."""
    values = values_among(args)
    # For instance every entry of an inverse depends on every entry of the matrix.
    for value in values:
        ids.keep_all(value.axes[-2:], MIXED)
    batches = [without_last_axes(value, 2) for value in values]
    return elementwise(ids, batches[0].shape, *batches)


@rule("flip")
def flip(ids: ChannelIds, shape: Shape, x: Value, dims: Sequence[int]) -> Axes:
    """`flip`: the ids are reversed like the channels."""
    axes = list(x.axes)
    for dim in dims:
        axis = axes[dim]
        if axis is not None:
            axes[dim] = axis[::-1]
    return tuple(axes)


@rule("histc", "histogram.bin_ct", "bincount", "put", "take", "as_strided", "_pdist_forward")
def keep_every_axis(ids: ChannelIds, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Operations that may move any value to any place: all axes are kept."""
    for value in values_among(args):
        ids.keep_all(value.axes, MIXED)
    return ()
