"""Clipped per-sample gradients for DP-SGD: a backward pass per sample, or `torch.func.vmap`.

`add_loop_` and `add_vmap_` add min(1, clip_norm / norm) * gradient of each sample to a sum. The
loop is slow and works for every network; other methods are compared with its results.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, arguments, call, join
from fedpress.core.parameters import trainable
from fedpress.privacy.per_example.guard import Guard

LossFn = Callable[[Tensor, Tensor], Tensor]
"""Function (outputs [n, ...], labels [n]) -> mean loss, a scalar. It is called for one example at a
time: n is 1, or 2 for two copies of the example."""

BLOCK = 64
"""Squares are summed in float32 within blocks of this size, and in float64 over blocks."""

MARGIN = 2.0**-18
"""Relative margin of clip factors, so that rounding never lets a gradient exceed the clip norm.

A float32 sum of `BLOCK` squares, in any order, may be too small by 2^-18 of itself (Higham 2002,
section 3.1), so the norm by 2^-19. A factor and its product with a value add 2^-24 each.
"""

WROTE_PREFIX = "RecipeError: "
"""Start of `Sample.problem` if the forward pass changed a buffer or parameter of the model."""


class Sample(NamedTuple):
    """Loss, gradient norm and problem of one sample, WITHOUT noise: they must not leave the client.

    Attributes:
        loss: the loss of the sample; nan if the network failed on the sample.
        norm: L2 norm of the gradient before clipping; nan if there is no gradient.
        problem: why the network failed on the sample; "" if it did not fail.
    """

    loss: float
    norm: float
    problem: str = ""


Measured = list[Sample]


@dataclass(frozen=True)
class Query:
    """The inputs of a sum of clipped per-sample gradients.

    Attributes:
        model: the network.
        loss_fn: outputs and labels of one example -> its loss.
        x: prepared inputs [n, ...].
        y: labels [n, ...].
        clip_norm: L2 bound of one sample's gradient.
    """

    model: nn.Module
    loss_fn: LossFn
    x: Inputs
    y: Tensor
    clip_norm: float

    def take(self, rows: slice | Tensor | list[int]) -> Query:
        """Returns the same query for some of the samples."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def one(self, row: int) -> Query:
        """Returns the same query for one sample."""
        # A slice keeps the batch dimension.
        return self.take(slice(row, row + 1))


def add_loop_(views: list[Tensor], query: Query, guard: Guard | None = None) -> Measured:
    """Adds the clipped gradient of every sample to `views`, with one backward pass per sample.

    This is slow, but correct for every network. A sample contributes zero if the network raises an
    error on it, if its gradient is not finite, or if the forward pass changes the model, which
    `guard` detects and undoes.
    If the whole batch were dropped instead, one sample could move the sum by more than `clip_norm`.

    Args:
        views: the sum, as one view per trainable parameter; changed in place.
        query: the samples.
        guard: detects and undoes changes of the model; None: no detection.
    """
    return [_add_one_(views, query.one(row), guard) for row in range(len(query.x))]


def _add_one_(views: list[Tensor], query: Query, guard: Guard | None) -> Sample:
    sample, used = _measure_one(views, query)
    changed = guard.put_back_() if guard is not None else ""
    if changed:
        return Sample(math.nan, math.nan, f"{WROTE_PREFIX}{changed}")
    if sample.problem:
        return sample
    return sample._replace(norm=_add_clipped_(used, query.clip_norm))


def _measure_one(views: list[Tensor], query: Query) -> tuple[Sample, list[tuple[Tensor, Tensor]]]:
    """Returns the loss of one sample, and (view of the sum, gradient) of each used parameter."""
    x = query.x
    y = query.y
    try:
        loss, grads = _gradient(query, x, y)
    except Exception as first:
        # Some networks fail on a batch of one (`squeeze()`). A batch of the sample and its copy has
        # the same mean loss and gradient, and involves no other sample.
        try:
            loss, grads = _gradient(query, join([x, x]), torch.cat([y, y]))
        except Exception:
            first_line = str(first).partition("\n")[0]
            problem = f"{type(first).__name__}: {first_line}"
            return Sample(math.nan, math.nan, problem), []
    used = []
    for view, gradient in zip(views, grads, strict=True):
        if gradient is None:
            continue
        # Embeddings can give sparse gradients, which have no norm.
        dense = gradient if gradient.layout == torch.strided else gradient.to_dense()
        used.append((view, dense))
    return Sample(float(loss.detach()), math.nan), used


def _gradient(query: Query, x: Inputs, y: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the loss of a batch, and for each trainable parameter its gradient or None."""
    loss = query.loss_fn(call(query.model, x), y)
    # A parameter that this sample does not reach has no gradient.
    return loss, torch.autograd.grad(loss, trainable(query.model), allow_unused=True)


def add_vmap_(views: list[Tensor], query: Query) -> Measured:
    """Adds the clipped gradient of every sample to `views`, all samples at once by `torch.func`.

    This is fast on GPUs and for small networks. All gradients are in memory at the same time.

    Args:
        views: the sum, as one view per trainable parameter; changed in place.
        query: the samples.
    """
    model = query.model
    x = query.x
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of(params: dict[str, Tensor], one: Inputs, label: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(model, params, *arguments(one[None]))
        loss = query.loss_fn(outputs, label[None])
        return loss, loss.detach()

    gradient_of_one = torch.func.grad(loss_of, has_aux=True)
    # "different": each sample gets its own dropout mask, as in the plain loop.
    each = torch.func.vmap(gradient_of_one, in_dims=(None, 0, 0), randomness="different")
    with warnings.catch_warnings():
        # torch warns about layers that vmap runs sample by sample; users cannot change that.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads, losses = each(named, x, query.y)
    # The sensitivity depends on the norms, so autocast must not compute them in 16 bits.
    with torch.autocast(x.device.type, enabled=False):
        # A parameter without dimensions gets one column, because the product of no sizes is 1.
        rows = [g.reshape(len(g), math.prod(g.shape[1:])) for g in grads.values()]
        norms = torch.stack([row_norms(part) for part in rows]).norm(dim=0)
        scale = clip_factors(norms, query.clip_norm).float()
        finite = torch.isfinite(norms)
        for view, part in zip(views, rows, strict=True):
            if not finite.all():
                # A factor of 0 is not enough, because 0 * NaN is NaN.
                part = part.where(finite[:, None], 0.0)
            view.add_((scale @ part).view(view.shape))
    measured = [Sample(*pair) for pair in zip(losses.tolist(), norms.tolist(), strict=True)]
    return _redo_not_finite_(measured, views, query)


def row_norms(rows: Tensor) -> Tensor:
    """Returns the L2 norm of each row of `rows` [n, m] float32, as float64 [n].

    Its relative error is about 1e-7, and never above 2^-19. Over millions of values a float32 sum
    of squares may be too small by 5e-4, and a clipped gradient would then exceed the clip norm.
    Therefore only blocks of `BLOCK` values are summed in float32. Summing everything in float64
    would be several times slower.
    """
    whole = rows.shape[1] // BLOCK * BLOCK
    blocks = rows[:, :whole].view(len(rows), whole // BLOCK, BLOCK).norm(dim=2)
    rest = rows[:, whole:].norm(dim=1, keepdim=True)
    norms: Tensor = torch.cat([blocks, rest], dim=1).double().norm(dim=1)
    return norms


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns the factor of each sample's gradient, float64 [n]; 0 where its norm is not finite.

    Args:
        norms: norms from `row_norms`, [n].
        clip_norm: the L2 bound. Each gradient times its factor, both rounded to float32, has at
            most this norm, because factors are smaller by `MARGIN`.
    """
    # clamp_min makes the factor exactly 1 for short gradients, and avoids a division by 0.
    factors = clip_norm / (norms * (1 + MARGIN)).clamp_min(clip_norm)
    return torch.where(torch.isfinite(norms), factors, 0.0)


def clip_factor(norm: float, clip_norm: float) -> float:
    """Returns `clip_factors` of one finite norm."""
    return clip_norm / max(norm * (1 + MARGIN), clip_norm)


def _redo_not_finite_(measured: Measured, views: list[Tensor], query: Query) -> Measured:
    """Repeats samples without a finite float32 norm with the loop, which also tries float64."""
    for i, sample in enumerate(measured):
        if not math.isfinite(sample.norm):
            measured[i] = add_loop_(views, query.one(i))[0]
    return measured


def _add_clipped_(used: list[tuple[Tensor, Tensor]], clip_norm: float) -> float:
    """Adds one sample's clipped gradient to the sum and returns its norm before clipping.

    Args:
        used: (view of the sum, gradient) of each parameter.
        clip_norm: the L2 bound.
    """
    if not used:
        return 0.0
    into = []
    given = []
    for view, gradient in used:
        into.append(view)
        given.append(gradient)
    norm = _norm(given)
    if math.isfinite(norm):
        torch._foreach_add_(into, given, alpha=clip_factor(norm, clip_norm))
        return norm
    # In float32 squares overflow long before the values do. If the float64 norm is not finite
    # either, a value is NaN or infinite, and the sample contributes zero.
    wide = [gradient.double() for gradient in given]
    norm = _norm(wide)
    if math.isfinite(norm):
        factor = clip_factor(norm, clip_norm)
        torch._foreach_add_(into, [(gradient * factor).float() for gradient in wide])
    return norm


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([row_norms(t.reshape(1, -1)) for t in tensors]).norm())
