"""Statistics, and whatever mixes values along some axes: those axes stay whole, the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpress.compress.prune.ids import Ids, Value
from fedpress.compress.prune.rules.table import Axes, Shape, elementwise, named, rule

OF_ZEROS = ("sum", "linalg_vector_norm", "norm")
"""Statistics to which zeros add nothing."""
MEANS = ("mean", "var", "std", "var_mean", "std_mean")
"""Statistics that norms are written with."""


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
def along(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes:
    """Values are mixed, counted or moved along some axes, of which no channel may go; a sum or norm of zeros may."""
    rank, name = len(x.shape), ids.operation.split(".")[1]
    dims = _dims(ids, x, rest, options)
    passed = tuple(None if d in dims else axis for d, axis in enumerate(x.axes))
    # A mean that keeps its axis: a norm written by hand.
    if name in MEANS and len(shape) == rank and not x.weights:
        kind = "grn" if x.pooled else "layer_norm"
        if any(ids.pass_norm(kind, x.axes[d]) for d in dims):
            return passed
    adds_nothing = x.zero and name in OF_ZEROS
    if ids.is_used and not adds_nothing:
        reduces = len(shape) < rank or _has_argument(ids, "keepdim")
        why = "a statistic over channels" if reduces else "values are mixed across channels"
        for d in dims:
            ids.keep(x.axes[d], why)
    if len(shape) == rank:
        return passed
    return tuple(axis for d, axis in enumerate(passed) if d not in dims)


def _has_argument(ids: Ids, name: str) -> bool:
    return any(argument.name == name for argument in ids.target._schema.arguments)


def _dims(ids: Ids, x: Value, rest: Any, options: Any) -> set[int]:
    """Returns along which axes of `x` the present operation works: its argument says so, or it is all."""
    rank, name = len(x.shape), ids.operation.split(".")[1]
    if name in ("tril", "triu"):
        return {rank - 2, rank - 1}
    if name == "msort":
        return {0}
    given = named(ids, [x, *rest], options)
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return set(range(rank))
    if not rank:
        return set()
    return {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


@rule("quantile", "nanquantile")
def quantile(ids: Ids, shape: Shape, x: Value, q: Any, *rest: Any, **options: Any) -> Axes:
    """Sorts along one axis, or all; several quantiles stand in a new first axis."""
    several = isinstance(q, Value) and len(q.shape) == 1
    kept = along(ids, shape[1:] if several else shape, x, q, *rest, **options)
    return (None, *kept) if several else kept


@rule("cosine_similarity", "linalg_cross")
def pairs(ids: Ids, shape: Shape, x: Value, y: Value, *rest: Any, **options: Any) -> Axes:
    """Two tensors meet index by index, and along one axis their values are mixed."""
    dim = named(ids, [x, y, *rest], options)["dim"]
    rank = max(len(x.shape), len(y.shape))
    dim %= rank
    for value in (x, y):
        at = dim - rank + len(value.shape)
        if at >= 0:
            ids.keep(value.axes[at], "a statistic over channels")
    wide = tuple(
        max(sizes) for sizes in zip(*(_to_rank(v.shape, rank) for v in (x, y)), strict=True)
    )
    axes = elementwise(ids, wide, x, y)
    return axes if len(shape) == rank else (*axes[:dim], *axes[dim + 1 :])


def _to_rank(shape: Shape, rank: int) -> Shape:
    return (1,) * (rank - len(shape)) + shape


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(ids: Ids, shape: Shape, x: Value, y: Value, *rest: Any, **options: Any) -> Axes:
    """Every row of `x` meets every row of `y`; a distance is a statistic over the last axis."""
    for value in (x, y):
        ids.keep(value.axes[-1], "a statistic over channels")
    lead = elementwise(ids, shape[:-2], *(Value(v.shape[:-2], v.axes[:-2]) for v in (x, y)))
    return (*lead, x.axes[-2], y.axes[-2])


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
def matrices(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Linear algebra on the last two axes, which stay whole; the axes before them are a batch."""
    values = [a for a in args if isinstance(a, Value)]
    fronts = []
    for value in values:
        for axis in value.axes[-2:]:
            ids.keep(axis, "values are mixed across channels")
        fronts.append(Value(value.shape[:-2], value.axes[:-2]))
    lead = elementwise(ids, values[0].shape[:-2], *fronts)
    return lead


@rule("flip")
def flip(ids: Ids, shape: Shape, x: Value, dims: Sequence[int]) -> Axes:
    """Channels stand the other way round, also those that are left."""
    turned = {d % len(x.shape) for d in dims}
    return tuple(
        axis if axis is None or d not in turned else axis[::-1] for d, axis in enumerate(x.axes)
    )


@rule("histc", "histogram.bin_ct", "bincount", "put", "take", "as_strided", "_pdist_forward")
def mixed(ids: Ids, shape: Shape, *args: Any, **options: Any) -> Axes:
    """Any value may go anywhere: all axes stay."""
    for value in args:
        for axis in value.axes if isinstance(value, Value) else ():
            ids.keep(axis, "values are mixed across channels")
    return ()
