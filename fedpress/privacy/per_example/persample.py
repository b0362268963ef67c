"""Clipped per-sample gradients for any network: one sample after the other, or all at once by `torch.func`."""

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
"""(outputs [n, ...], labels [n]) -> mean loss, a scalar; it is asked for one example at a time."""

BLOCK = 1024
WRITTEN = "RecipeError: "
"""How the problem of a sample begins in whose forward pass the network wrote into itself."""


class Sample(NamedTuple):
    """What happened to one sample; not private. `problem` says why the network could not run on it, else empty."""

    loss: float
    norm: float
    problem: str = ""


Measured = list[Sample]


@dataclass(frozen=True)
class Query:
    """What is asked of the samples `x` [n, ...] with labels `y` [n, ...]: the sum of their clipped gradients."""

    model: nn.Module
    loss_fn: LossFn
    x: Inputs
    y: Tensor
    clip_norm: float

    def take(self, rows: slice | Tensor | list[int]) -> Query:
        """Asks the same of some of the samples."""
        return replace(self, x=self.x[rows], y=self.y[rows])

    def one(self, row: int) -> Query:
        """Asks the same of one sample."""
        return self.take(slice(row, row + 1))


def add_loop_(views: list[Tensor], query: Query, guard: Guard | None = None) -> Measured:
    """Adds the clipped gradient of every sample to `views`, a backward pass each: slow, right for every network.

    A sample on which the network raises contributes zero, like one whose gradient is not finite, or one in whose
    forward pass the network wrote into itself, which `guard` takes back. If it took the whole batch with it, one sample
    could move the sum by more than `clip_norm`.
    """
    return [_add_one_(views, query.one(row), guard) for row in range(len(query.x))]


def _add_one_(views: list[Tensor], query: Query, guard: Guard | None) -> Sample:
    sample, used = _measure_one(views, query)
    changed = guard.put_back_() if guard is not None else ""
    if changed:
        return Sample(math.nan, math.nan, f"{WRITTEN}{changed}")
    return sample if sample.problem else sample._replace(norm=_add_clipped_(used, query.clip_norm))


def _measure_one(views: list[Tensor], query: Query) -> tuple[Sample, list[tuple[Tensor, Tensor]]]:
    """Returns the loss of one sample, and the gradient of each parameter that has one with its place in the sum."""
    x, y = query.x, query.y
    try:
        loss, grads = _gradient(query, x, y)
    except Exception as first:
        # Some networks cannot take a batch of one (`squeeze()`). The mean loss of a sample and its copy has the same
        # gradient, and no other sample is in it.
        try:
            loss, grads = _gradient(query, join([x, x]), torch.cat([y, y]))
        except Exception:
            return Sample(
                math.nan, math.nan, f"{type(first).__name__}: {str(first).partition(chr(10))[0]}"
            ), []
    used = [
        (v, g if g.layout == torch.strided else g.to_dense())
        for v, g in zip(views, grads, strict=True)
        if g is not None
    ]
    return Sample(float(loss.detach()), math.nan), used


def _gradient(query: Query, x: Inputs, y: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Returns the loss of a batch and the gradient of each trainable parameter, None where it is not used."""
    loss = query.loss_fn(call(query.model, x), y)
    return loss, torch.autograd.grad(loss, trainable(query.model), allow_unused=True)


def add_vmap_(views: list[Tensor], query: Query) -> Measured:
    """Adds the clipped gradients by `torch.func`, which keeps n gradients in memory: for GPUs and small nets."""
    model, x = query.model, query.x
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss_of(params: dict[str, Tensor], one: Inputs, label: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(model, params, *arguments(one[None]))
        loss = query.loss_fn(outputs, label[None])
        return loss, loss.detach()

    each = torch.func.vmap(
        torch.func.grad(loss_of, has_aux=True), in_dims=(None, 0, 0), randomness="different"
    )
    with (
        warnings.catch_warnings()
    ):  # a layer without a rule of its own is slow there, but no user can mend that
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads, losses = each(named, x, query.y)
    with torch.autocast(x.device.type, enabled=False):  # the norm is a promise: never in 16 bits
        parts = [
            g.reshape(len(g), math.prod(g.shape[1:])) for g in grads.values()
        ]  # also of numbers without dimensions
        norms = torch.stack([row_norms(part) for part in parts]).norm(dim=0)
        scale = clip_factors(norms, query.clip_norm).float()
        for view, part in zip(views, parts, strict=True):
            if not torch.isfinite(norms).all():
                part = part.where(torch.isfinite(norms)[:, None], 0.0)  # 0 * NaN would be NaN
            view.add_((scale @ part).view(view.shape))
    measured = [Sample(*pair) for pair in zip(losses.tolist(), norms.tolist(), strict=True)]
    return _redo_bad_(measured, views, query)


def row_norms(rows: Tensor) -> Tensor:
    """Returns the L2 norm of each row of `rows` [n, m] float32, as float64 [n] and right to 1e-6.

    Over millions of values a float32 sum of squares falls short by up to 5e-4, which would break the clip norm; so
    only short blocks are summed in float32, at a small part of the price of doing all in float64.
    """
    cut = rows.shape[1] // BLOCK * BLOCK
    blocks = rows[:, :cut].view(len(rows), cut // BLOCK, BLOCK).norm(dim=2)
    parts = torch.cat([blocks, rows[:, cut:].norm(dim=1, keepdim=True)], dim=1)
    norms: Tensor = parts.double().norm(dim=1)
    return norms


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """Returns what each sample's gradient is multiplied by; 0 where its norm [n] is not finite."""
    return torch.where(torch.isfinite(norms), clip_norm / norms.clamp_min(clip_norm), 0.0)


def _redo_bad_(measured: Measured, views: list[Tensor], query: Query) -> Measured:
    """Takes the samples that had no finite float32 norm once more, alone and in float64."""
    for i, sample in enumerate(measured):
        if not math.isfinite(sample.norm):
            measured[i] = add_loop_(views, query.one(i))[0]
    return measured


def _add_clipped_(used: list[tuple[Tensor, Tensor]], clip_norm: float) -> float:
    """Adds one sample's clipped gradient to the sum and returns its norm before clipping."""
    if not used:
        return 0.0
    into, given = [v for v, _ in used], [g for _, g in used]
    norm = _norm(given)
    if math.isfinite(norm):
        torch._foreach_add_(into, given, alpha=clip_norm / max(norm, clip_norm))
        return norm
    # Squares overflow float32 long before the values do; in float64 only true NaN and inf are left.
    wide = [g.double() for g in given]
    norm = _norm(wide)
    if math.isfinite(norm):
        torch._foreach_add_(into, [(g * (clip_norm / max(norm, clip_norm))).float() for g in wide])
    return norm


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([row_norms(t.reshape(1, -1)) for t in tensors]).norm())
