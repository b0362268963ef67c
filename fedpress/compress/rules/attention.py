"""Products: with weights, which write and read channels, and of activations, as in attention, which lose heads."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedpress.compress.ids import Axis, Ids, Value, sizes
from fedpress.compress.rules.table import Axes, Shape, elementwise, rule

PRODUCT = "a product of activations, which may be scaled by its size"


@rule("matmul", "mm", "bmm")
def matmul(ids: Ids, shape: Shape, x: Value, y: Value) -> Axes:
    """`x @ w` with weights `w` [in, out] reads axis 0 and writes axis 1; a product of activations may lose heads."""
    if len(y.shape) == 2 and y.weights and x.axes and not x.weights:
        ids.unite(y.axes[0], x.axes[-1])
        ids.mark(y.axes[0], "read")
        ids.mark(y.axes[1], "write")
        ids.multiply(1, *sizes(x.shape, x.axes), *sizes(y.shape[1:], y.axes[1:]))
        return (*x.axes[:-1], y.axes[1])
    row = x.axes[-2:-1]
    column = y.axes[-1:] if len(y.shape) > 1 else ()
    for axis in (x.axes[-1], y.axes[-2] if len(y.shape) > 1 else y.axes[0]):
        ids.freeze(axis, PRODUCT)
    batch = _heads(ids, shape[: len(shape) - len(row) - len(column)], _front(x), _front(y))
    out = (*batch, *row, *column)
    ids.multiply(x.shape[-1], *sizes(shape, out))
    return out


@rule("baddbmm", "addmm")
def added(ids: Ids, shape: Shape, bias: Value, x: Value, y: Value, **options: Any) -> Axes:
    """A product, and something added."""
    axes = matmul(ids, shape, x, y)
    return elementwise(ids, shape, Value(shape, axes), bias)


@rule("scaled_dot_product_attention.default")
def attention(
    ids: Ids, shape: Shape, q: Value, k: Value, v: Value, mask: Value | None = None, *rest: Any, **options: Any
) -> Axes:
    """[..., heads, length, width]: heads go, and what `v` carries; the width of `q` and `k` scales their product."""
    if q.shape[:-2] != k.shape[:-2] and len(q.shape) > 2:  # several heads of q share one of k and v
        k, v = (_repeated(x, q.shape[-3] // x.shape[-3]) for x in (k, v))
    batch = _heads(ids, shape[:-2], *(_front(x) for x in (q, k, v)))
    for axis in (q.axes[-1], k.axes[-1]):
        ids.freeze(axis, PRODUCT)
    for axis in (q.axes[-2], k.axes[-2], v.axes[-2]):
        ids.freeze(axis, "values are mixed across channels")
    if mask is not None and len(mask.shape) > 2:
        elementwise(ids, shape[:-2], Value(shape[:-2], batch), _front(mask))
    heads = sizes(shape[:-2], batch)
    ids.multiply(q.shape[-2] * k.shape[-2] * q.shape[-1], *heads)
    ids.multiply(q.shape[-2] * k.shape[-2], *heads, *sizes(v.shape[-1:], v.axes[-1:]))
    return (*batch, None, v.axes[-1])


def _front(x: Value) -> Value:
    return Value(x.shape[:-2], x.axes[:-2])


def _heads(ids: Ids, shape: Shape, *values: Value) -> Axes:
    """Ties the batch axes of a product; heads, if they are among them, are what should go."""
    axes = elementwise(ids, shape, *values)
    for axis in axes:
        ids.prefer(axis)
    return axes


def _repeated(x: Value, times: int) -> Value:
    at = len(x.shape) - 3
    heads = x.axes[at]
    wide: Axis = None if heads is None else np.repeat(heads, times)
    shape = (*x.shape[:at], x.shape[at] * times, *x.shape[at + 1 :])
    return Value(shape, (*x.axes[:at], wide, *x.axes[at + 1 :]))


@rule("einsum.default")
def einsum(ids: Ids, shape: Shape, equation: str, values: list[Value], **options: Any) -> Axes:
    """A product by letters: one letter is one axis; a letter that is summed over must stay, unless weights read it."""
    left, _, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    known: dict[str, Axis] = {}
    if "." in equation or not out:
        for value in values:
            for axis in value.axes:
                ids.freeze(axis, PRODUCT)
        return (None,) * len(shape)
    for term, value in zip(terms, values, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            if letter in known:
                ids.unite(known[letter], axis) if known[letter] is not None or axis is not None else None
            known[letter] = axis if known.get(letter) is None else known[letter]
    every = "".join(terms)
    size = {c: n for term, v in zip(terms, values, strict=True) for c, n in zip(term, v.shape, strict=True)}
    read = any(v.weights for v in values) and not all(v.weights for v in values)
    for term, value in zip(terms, values, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            if letter not in out and not read:
                ids.freeze(axis, PRODUCT)
            elif value.weights and read:
                ids.mark(axis, "write" if letter in out else "read")
            elif every.count(letter) > 1 and letter in out:
                ids.prefer(axis)
    ids.multiply(1, *sizes([size[c] for c in known], list(known.values())))
    return tuple(known[c] for c in out)
