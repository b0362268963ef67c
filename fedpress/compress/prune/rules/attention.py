"""Products: with weights, which write and read channels, and of activations, as in attention, which lose heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, Ids, Value, sizes
from fedpress.compress.prune.rules.table import Axes, Shape, aten, elementwise, rule, tie

ALIGNED = 8  # numbers of 2 bytes in 16 bytes; of 4 bytes it is two rows of 16
PRODUCT = "a product of activations, which may be scaled by its size"


@rule("matmul", "mm", "bmm", "mv")
def matmul(ids: Ids, shape: Shape, x: Value, y: Value) -> Axes:
    """Weights on one side read the axis that is summed over and write the other; activations may lose heads."""
    summed = y.axes[-2] if len(y.shape) > 1 else y.axes[0]
    row = x.axes[-2:-1]
    column = y.axes[-1:] if len(y.shape) > 1 else ()
    left, right = _weights(x, y)
    if right and not left:
        _contract(ids, summed, x.axes[-1], column)
    elif left and not right:
        _contract(ids, x.axes[-1], summed, row)
    elif (
        ids.target is aten.mv.default and x.zero and y.zero
    ):  # a masked weight adds nothing to the sum
        ids.unite(x.axes[-1], summed)
    else:
        for axis in (x.axes[-1], summed):
            ids.keep(axis, PRODUCT)
    if len(y.shape) <= 2 and right:
        out = (*x.axes[:-1], *column)
    else:
        batch = _heads(ids, shape[: len(shape) - len(row) - len(column)], _front(x), _front(y))
        out = (*batch, *row, *column)
    if len(x.shape) > 1 and len(y.shape) > 1:
        ids.multiply(1, *sizes(shape, out), *sizes(x.shape[-1:], x.axes[-1:]))
    return out


def _weights(*values: Value) -> list[bool]:
    """Says which factors are the weights of a product; weights that are chosen by the input are, beside activations."""
    plain = [value.weights for value in values]
    return plain if any(plain) else [value.selected for value in values]


def _contract(ids: Ids, weight: Axis, source: Axis, out: Axes) -> None:
    ids.unite(weight, source)
    ids.mark(weight, "read")
    for axis in out:
        ids.mark(axis, "write")


@rule("dot", "vdot")
def dot(ids: Ids, shape: Shape, x: Value, y: Value) -> Axes:
    """A sum over all places, to which masked weights add nothing."""
    if x.zero and y.zero:
        ids.unite(x.axes[0], y.axes[0])
    else:
        for value in (x, y):
            ids.keep(value.axes[0], PRODUCT)
    return ()


@rule("bilinear")
def bilinear(
    ids: Ids,
    shape: Shape,
    x: Value,
    y: Value,
    weight: Value,
    bias: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """`out[o] = x W[o] y`: reads two axes of the weight and writes the first."""
    out = weight.axes[0]
    for axis, source in ((weight.axes[1], x.axes[-1]), (weight.axes[2], y.axes[-1])):
        _contract(ids, axis, source, ())
    ids.mark(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    lead = elementwise(ids, shape[:-1], *(Value(v.shape[:-1], v.axes[:-1]) for v in (x, y)))
    return (*lead, out)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped(
    ids: Ids,
    shape: Shape,
    x: Value,
    y: Value,
    offs: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """Rows [n, in] by the weights [experts, in, out] of their expert: the experts' weights lose the same places.

    The kernel takes rows of whole 16 bytes, so that neighbours go together. Other forms (each expert with its own
    columns) are products of activations here.
    """
    if len(x.shape) != 2 or len(y.shape) != 3:
        return matmul(ids, shape, x, y) if len(x.shape) == len(y.shape) == 3 else _apart(ids, x, y)
    ids.keep(y.axes[0], "experts are chosen by number")
    for axis in (x.axes[1], *y.axes[1:]):
        _in_blocks(ids, axis, ALIGNED)
    if _weights(x, y) == [False, True]:
        _contract(ids, y.axes[1], x.axes[1], y.axes[2:])
    else:
        for axis in (y.axes[1], x.axes[1]):
            ids.keep(axis, PRODUCT)
    ids.multiply(x.shape[0], *sizes(y.shape[1:], y.axes[1:]))
    return (x.axes[0], y.axes[2])


def _in_blocks(ids: Ids, axis: Axis, size: int) -> None:
    if axis is not None and len(axis) % size:
        ids.keep(axis, f"the kernel takes multiples of {size}")
    elif axis is not None:
        ids.unite(axis, np.repeat(axis[::size], size))


def _apart(ids: Ids, *values: Value) -> Axes:
    for value in values:
        for axis in value.axes:
            ids.keep(axis, PRODUCT)
    return ()


@rule("baddbmm", "addmm", "addmv")
def added(ids: Ids, shape: Shape, bias: Value, x: Value, y: Value, **options: Any) -> Axes:
    """A product, and something added."""
    axes = matmul(ids, shape, x, y)
    return elementwise(ids, shape, Value(shape, axes), bias)


@rule("scaled_dot_product_attention.default")
def attention(
    ids: Ids,
    shape: Shape,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """[..., heads, length, width]: heads go, and what `v` carries; the width of `q` and `k` scales their product."""
    if q.shape[:-2] != k.shape[:-2] and len(q.shape) > 2:  # several heads of q share one of k and v
        k, v = (_repeated(x, q.shape[-3] // x.shape[-3]) for x in (k, v))
    batch = _heads(ids, shape[:-2], *(_front(x) for x in (q, k, v)))
    for axis in (q.axes[-1], k.axes[-1]):
        ids.keep(axis, PRODUCT)
    for axis in (q.axes[-2], k.axes[-2], v.axes[-2]):
        ids.keep(axis, "values are mixed across channels")
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
    terms, out = letters(equation, [len(value.shape) for value in values])
    size, known = _letter_axes(ids, terms, values)
    weights = _weights(*values)
    read: set[str] = set()  # letters of the weights, beside activations
    if not all(weights):
        read = {letter for term, own in zip(terms, weights, strict=True) if own for letter in term}
    uses = Counter("".join(terms))
    for term, value, own in zip(terms, values, weights, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            if letter not in out and letter not in read:
                ids.keep(axis, PRODUCT)
            elif own and read:
                ids.mark(axis, "write" if letter in out else "read")
            elif uses[letter] > 1 and letter in out:
                ids.prefer(axis)
    if len(values) > 1:
        ids.multiply(1, *sizes([size[letter] for letter in known], list(known.values())))
    return tuple(known[letter] for letter in out)


def _letter_axes(
    ids: Ids, terms: Sequence[str], values: Sequence[Value]
) -> tuple[dict[str, int], dict[str, Axis]]:
    """Returns the size and the ids of each letter, whose axes are one; an axis of size 1 is spread over the others."""
    size: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, n in zip(term, value.shape, strict=True):
            size[letter] = max(n, size.get(letter, 1))
    known: dict[str, Axis] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, n, axis in zip(term, value.shape, value.axes, strict=True):
            if n < size[letter]:
                ids.keep(axis, "one channel is spread over many")
                continue
            if letter in known:
                tie(ids, known[letter], axis)
            known[letter] = axis if known.get(letter) is None else known[letter]
    return size, known


def letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Returns the letters of each term of an `einsum`, and of its output, with those that an ellipsis stands for.

    An ellipsis covers the axes that have no letter; those of several terms are lined up at their last axis. Without an
    arrow the output has those first, then the letters that come once, in order.

    >>> letters("...ij,jk", [4, 2])
    (['ABij', 'jk'], 'ABik')
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    written = left.split(",")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    longest = max(
        (rank - len(t) + 3 for t, rank in zip(written, ranks, strict=True) if "..." in t), default=0
    )
    stand_in = "".join(free[:longest])
    terms = []
    for term, rank in zip(written, ranks, strict=True):
        covered = rank - len(term) + 3 if "..." in term else 0
        terms.append(term.replace("...", stand_in[longest - covered :]))
    if not arrow:
        once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
        return terms, stand_in + "".join(once)
    return terms, out.replace("...", stand_in)
