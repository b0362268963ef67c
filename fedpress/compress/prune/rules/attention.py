"""Pruning rules of matrix products: with weights, and between activations as in attention.

Each index of a channel axis has an id. A rule unites the ids of channels that must be pruned
together, keeps the ids of channels that cannot be pruned, and returns the ids of the output's axes.
Its argument `shape` is the shape of the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedpress.compress.prune.ids import Axis, ChannelIds, Value, ids_or_sizes
from fedpress.compress.prune.rules.table import (
    Axes,
    Shape,
    aten,
    elementwise,
    repeat_each,
    replace_entry,
    rule,
    without_last_axes,
)

ALIGNED = 8
"""Grouped products lose channels in blocks of 8: their kernel takes rows of 16, 32, ... bytes."""
PRODUCT = "a product of activations, which may be scaled by its size"
"""Reason why a summed axis is kept: attention divides by the square root of its size."""


@rule("matmul", "mm", "bmm", "mv")
def matmul(ids: ChannelIds, shape: Shape, x: Value, y: Value) -> Axes:
    """Matrix product [..., rows, summed] @ [..., summed, columns], or of vectors.

    If one factor is a weight, its summed axis has input channels, and its other axis has output
    channels. In a product of two activations the summed axis is kept; batch axes, such as the heads
    of attention, can be pruned.
    """
    x_summed = x.axes[-1]
    rows = x.axes[-2:-1]
    if len(y.shape) > 1:
        y_summed, columns = y.axes[-2], y.axes[-1:]
    else:
        y_summed, columns = y.axes[0], ()
    # With two weights (a low-rank product) neither has the role of an input.
    x_is_weight, y_is_weight = _are_weights(x, y)
    if y_is_weight and not x_is_weight:
        _apply_weight(ids, y_summed, x_summed, columns)
    elif x_is_weight and not y_is_weight:
        _apply_weight(ids, x_summed, y_summed, rows)
    elif ids.target is aten.mv.default and x.zero_when_masked and y.zero_when_masked:
        # Spectral norm multiplies a weight by a vector. The parity check sets pruned entries to 0,
        # so they add nothing to the sum.
        ids.unite(x_summed, y_summed)
    else:
        ids.keep_all((x_summed, y_summed), PRODUCT)

    # A weight matrix on the right leaves all leading axes of `x` as they are.
    if len(y.shape) <= 2 and y_is_weight:
        out = (*x.axes[:-1], *columns)
    else:
        batch_shape = shape[: len(shape) - len(rows) - len(columns)]
        batch = _unite_batch(ids, batch_shape, without_last_axes(x, 2), without_last_axes(y, 2))
        out = (*batch, *rows, *columns)
    # Matrix-vector products are not counted, as in torch's FlopCounterMode.
    if len(x.shape) > 1 and len(y.shape) > 1:
        summed = ids_or_sizes(x.shape[-1:], x.axes[-1:])
        ids.count_multiply_adds(1, *ids_or_sizes(shape, out), *summed)
    return out


def _are_weights(*values: Value) -> list[bool]:
    """Returns for each factor of a product whether it is a weight.

    Gathered weights (the weights of the experts that the input chooses) count as weights only if no
    factor is a plain weight. Otherwise they are the input of the plain weight.
    """
    plain = [value.from_weights for value in values]
    if any(plain):
        return plain
    return [value.gathered_weights for value in values]


def _apply_weight(ids: ChannelIds, weight: Axis, source: Axis, out: Axes) -> None:
    """Unites the summed axes of a weight and its input, and marks the weight's output channels."""
    ids.unite(weight, source)
    ids.mark_role(weight, "read")
    for axis in out:
        ids.mark_role(axis, "write")


@rule("dot", "vdot")
def dot(ids: ChannelIds, shape: Shape, x: Value, y: Value) -> Axes:
    """Dot product of two vectors: entries can be pruned if pruned ones would be 0 in both vectors.

    The parity check compares the pruned network with one whose pruned weights are 0 (masked).
    """
    # Otherwise the masked network adds an entry to the sum that the pruned network does not have.
    if x.zero_when_masked and y.zero_when_masked:
        ids.unite(x.axes[0], y.axes[0])
    else:
        ids.keep_all((x.axes[0], y.axes[0]), PRODUCT)
    return ()


@rule("bilinear")
def bilinear(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    y: Value,
    weight: Value,
    bias: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """Bilinear layer, `out[o] = x W[o] y` with weight W [out, inputs of x, inputs of y]."""
    out, x_read, y_read = weight.axes
    _apply_weight(ids, x_read, x.axes[-1], ())
    _apply_weight(ids, y_read, y.axes[-1], ())
    ids.mark_role(out, "write")
    if bias is not None:
        ids.unite(out, bias.axes[0])
    batch = elementwise(ids, shape[:-1], without_last_axes(x, 1), without_last_axes(y, 1))
    return (*batch, out)


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(
    ids: ChannelIds,
    shape: Shape,
    x: Value,
    y: Value,
    offs: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """Grouped product: multiplies each row of [n, in] by one of the weights [experts, in, out].

    All experts lose the same channels, in blocks of 8. Two factors with 3 axes each are a batched
    product (`matmul`). For any other shapes all axes are kept.
    """
    if len(x.shape) == len(y.shape) == 3:
        return matmul(ids, shape, x, y)
    if len(x.shape) != 2 or len(y.shape) != 3:
        ids.keep_all((*x.axes, *y.axes), PRODUCT)
        return ()

    # The router's outputs count the experts, and it selects them by index.
    ids.keep(y.axes[0], "experts are chosen by index")
    for axis in (x.axes[1], *y.axes[1:]):
        _unite_blocks(ids, axis, ALIGNED)
    if _are_weights(x, y) == [False, True]:
        _apply_weight(ids, y.axes[1], x.axes[1], y.axes[2:])
    else:
        ids.keep_all((y.axes[1], x.axes[1]), PRODUCT)
    # Each row is multiplied by the weights of one expert only.
    ids.count_multiply_adds(x.shape[0], *ids_or_sizes(y.shape[1:], y.axes[1:]))
    return (x.axes[0], y.axes[2])


def _unite_blocks(ids: ChannelIds, axis: Axis, size: int) -> None:
    """Unites each block of `size` consecutive channels; keeps an axis whose last block is short."""
    if axis is None:
        return
    if len(axis) % size:
        ids.keep(axis, f"the kernel takes multiples of {size}")
    else:
        ids.unite(axis, np.repeat(axis[::size], size))


@rule("baddbmm", "addmm", "addmv")
def product_plus_bias(
    ids: ChannelIds, shape: Shape, bias: Value, x: Value, y: Value, **options: Any
) -> Axes:
    """Fused form of a linear layer, `bias + x @ y`."""
    axes = matmul(ids, shape, x, y)
    # The bias may be broadcast, so the rule of additions is used.
    return elementwise(ids, shape, Value(shape, axes), bias)


@rule("scaled_dot_product_attention.default")
def attention(
    ids: ChannelIds,
    shape: Shape,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    *rest: Any,
    **options: Any,
) -> Axes:
    """Attention on [..., heads, length, width]: heads, and the width of `v`, can be pruned.

    The width of `q` and `k` is kept, because attention divides their product by sqrt(width).
    Several heads of `q` may share one head of `k` and `v` (grouped queries, Ainslie et al. 2023,
    arXiv:2305.13245).
    """
    if q.shape[:-2] != k.shape[:-2] and len(q.shape) > 2:
        k = _repeat_heads(k, q.shape[-3] // k.shape[-3])
        v = _repeat_heads(v, q.shape[-3] // v.shape[-3])
    batch = _unite_batch(
        ids, shape[:-2], without_last_axes(q, 2), without_last_axes(k, 2), without_last_axes(v, 2)
    )
    ids.keep_all((q.axes[-1], k.axes[-1]), PRODUCT)
    ids.keep_all((q.axes[-2], k.axes[-2], v.axes[-2]), "values are mixed across channels")
    if mask is not None and len(mask.shape) > 2:
        # A mask per head, for instance relative positions.
        elementwise(ids, shape[:-2], Value(shape[:-2], batch), without_last_axes(mask, 2))

    heads = ids_or_sizes(shape[:-2], batch)
    pairs = q.shape[-2] * k.shape[-2]
    ids.count_multiply_adds(pairs * q.shape[-1], *heads)
    ids.count_multiply_adds(pairs, *heads, *ids_or_sizes(v.shape[-1:], v.axes[-1:]))
    return (*batch, None, v.axes[-1])


def _unite_batch(ids: ChannelIds, shape: Shape, *values: Value) -> Axes:
    """Unites the batch axes of a product, such as heads.

    If a reshape splits an axis into a batch axis and others, the batch axis is pruned if possible.
    """
    axes = elementwise(ids, shape, *values)
    for axis in axes:
        ids.prefer_axis(axis)
    return axes


def _repeat_heads(x: Value, times: int) -> Value:
    """Repeats each head of keys or values [..., heads, length, width] for its queries."""
    # Query head i uses key head i // times, so each key head is repeated in place.
    at = len(x.shape) - 3
    shape = replace_entry(x.shape, at, x.shape[at] * times)
    return Value(shape, replace_entry(x.axes, at, repeat_each(x.axes[at], times)))


@rule("einsum.default")
def einsum(
    ids: ChannelIds, shape: Shape, equation: str, values: list[Value], **options: Any
) -> Axes:
    """`einsum("bij,jk->bik", x, w)`: all axes with the same letter are united.

    The axes of a letter that is summed over (j) are kept, unless one of them is an axis of a
    weight. If all factors are weights, these axes are always kept.
    """
    terms, out = einsum_letters(equation, [len(value.shape) for value in values])
    sizes, axes = _letter_axes(ids, terms, values)
    are_weights = _are_weights(*values)
    weight_letters: set[str] = set()
    if not all(are_weights):  # a product of weights alone has no input channels
        for term, is_weight in zip(terms, are_weights, strict=True):
            if is_weight:
                weight_letters.update(term)

    # A letter that occurs in several terms and in the output is a batch axis.
    uses = Counter("".join(terms))
    for term, value, is_weight in zip(terms, values, are_weights, strict=True):
        for letter, axis in zip(term, value.axes, strict=True):
            if letter not in out and letter not in weight_letters:
                ids.keep(axis, PRODUCT)
            elif is_weight and weight_letters:
                ids.mark_role(axis, "write" if letter in out else "read")
            elif uses[letter] > 1 and letter in out:
                ids.prefer_axis(axis)  # a batch axis, for instance heads

    if len(values) > 1:
        every_axis = ids_or_sizes([sizes[letter] for letter in axes], list(axes.values()))
        ids.count_multiply_adds(1, *every_axis)
    return tuple(axes[letter] for letter in out)


def _letter_axes(
    ids: ChannelIds, terms: Sequence[str], values: Sequence[Value]
) -> tuple[dict[str, int], dict[str, Axis]]:
    """Returns size and ids of each letter; axes of one letter are united."""
    sizes: dict[str, int] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))

    axes: dict[str, Axis] = {}
    for term, value in zip(terms, values, strict=True):
        for letter, size, axis in zip(term, value.shape, value.axes, strict=True):
            # einsum broadcasts an axis of size 1 over all indices of its letter.
            if size < sizes[letter]:
                ids.keep(axis, "one channel is broadcast over many")
                continue
            if letter in axes:
                ids.unite(axes[letter], axis)
            if axes.get(letter) is None:
                axes[letter] = axis
    return sizes, axes


def einsum_letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Returns the letters of each term of an `einsum`, and of its output, without ellipses.

    Axes under an ellipsis get capital letters; the ellipses of several terms are aligned at their
    last axis. Without an arrow the output has these axes first, then the letters that occur once,
    in alphabetical order.

    >>> einsum_letters("...ij,jk", [4, 2])
    (['ABij', 'jk'], 'ABik')

    Args:
        equation: such as "bij,bjk->bik".
        ranks: number of axes of each operand.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    written = left.split(",")
    covered = []  # how many axes the ellipsis of each term covers
    for term, rank in zip(written, ranks, strict=True):
        has_ellipsis = "..." in term
        covered.append(rank - len(term.replace("...", "")) if has_ellipsis else 0)

    # Capital letters stand for the covered axes, as few as the longest ellipsis needs.
    longest = max(covered, default=0)
    unused = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    ellipsis = "".join(unused[:longest])
    terms = []
    for term, count in zip(written, covered, strict=True):
        terms.append(term.replace("...", ellipsis[longest - count :]))
    if arrow:
        return terms, out.replace("...", ellipsis)

    once = sorted(c for c in set(left) if c.isalpha() and left.count(c) == 1)
    return terms, ellipsis + "".join(once)
