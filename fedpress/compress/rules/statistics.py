"""Statistics, pooling and whatever mixes values along some axes: those axes stay whole, the others pass."""

from __future__ import annotations

from typing import Any

from fedpress.compress.ids import Ids, Value
from fedpress.compress.rules.table import Axes, Shape, rule


@rule("softmax", "log_softmax", "cumsum", "cumprod", "flip", "roll", "argmax", "argmin", "topk", "sort", "cummax")
@rule("max.dim", "min.dim", "tril", "triu", "logsumexp")
def along(ids: Ids, shape: Shape, x: Value, *rest: Any, **options: Any) -> Axes | list[Axes]:
    """Mixes or moves the values along some axes: no channel of these may go."""
    rank, name = len(x.shape), ids.operation.split(".")[1]
    dims = list(range(rank))
    if name in ("softmax", "log_softmax", "cumsum", "cumprod", "flip") or (name in ("max", "min") and rest):
        given = rest[0] if isinstance(rest[0], list | tuple) else [rest[0]]
        dims = [d % rank for d in given]
    elif name == "roll" and len(rest) > 1 and rest[1]:
        dims = [d % rank for d in rest[1]]
    for d in dims:
        ids.freeze(x.axes[d], "values are mixed across channels")
    passing = tuple(None if d in dims else axis for d, axis in enumerate(x.axes))
    axes = passing if len(shape) == rank else tuple(a for d, a in enumerate(passing) if d not in dims)
    if len(axes) != len(shape):
        axes = (None,) * len(shape)
    return [axes, axes] if name in ("max", "min", "topk", "sort", "cummax") else axes


@rule("mean", "sum", "var", "std", "amax", "amin", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def reduction(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes | list[Axes]:
    """A statistic over channels would change if one went, but for a sum or norm of zeros; other axes pass."""
    given = next((a for a in (options.get("dim"), *args) if isinstance(a, list | tuple)), None)
    dims = {d % len(x.shape) for d in given or range(len(x.shape))}
    name = ids.operation.split(".")[1]
    same = x.zero and name in ("sum", "linalg_vector_norm", "norm")
    for d in dims if ids.read and not same else ():
        ids.freeze(x.axes[d], "a statistic over channels")
    keeps = [None if d in dims else axis for d, axis in enumerate(x.axes)]
    drops = [axis for d, axis in enumerate(x.axes) if d not in dims]
    axes = tuple(keeps if len(shape) == len(x.shape) else drops)
    return [axes, axes] if "_mean" in ids.operation else axes


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d")
@rule("adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
@rule("max_pool2d_with_indices", "adaptive_max_pool1d", "upsample_nearest1d", "upsample_linear1d", "upsample_bicubic2d")
@rule("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pooling(ids: Ids, shape: Shape, x: Value, *args: Any, **options: Any) -> Axes | list[Axes]:
    """Works on the axes whose size it changes, within each channel."""
    space = next(n for n in (1, 2, 3) if f"{n}d" in ids.operation)
    for axis in x.axes[-space:]:
        ids.freeze(axis, "pooling runs over channels")
    axes = (*x.axes[:-space], *[None] * space)
    return [axes, axes] if "with_indices" in ids.operation or "adaptive_max" in ids.operation else axes
