"""DP-SGD on one client's data: Poisson batches, clipped per-sample gradients, noise, a step; as a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs
from fedpress.core.parameters import trainable
from fedpress.core.random_source import Source
from fedpress.errors import RecipeError
from fedpress.privacy.noise.mechanism import noised_mean, poisson_batches
from fedpress.privacy.per_example.gradients import (
    Method,
    RawStats,
    choose_method,
    clipped_gradient_sum,
)
from fedpress.privacy.per_example.persample import LossFn
from fedpress.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class StepRecord:
    """One private step. `raw` is not private: it may be watched on the client but must not leave it."""

    step: int
    raw: RawStats


def private_steps(
    model: nn.Module,
    loss_fn: LossFn,
    x: Inputs,
    y: Tensor,
    *,
    plan: PrivacyPlan,
    steps: int,
    lr: float,
    generator: Source,
    momentum: float = 0.0,
    prepare: Callable[[Inputs], Inputs] | None = None,
    method: Method | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[StepRecord]:
    """Trains the parameters of `model` in place by DP-SGD (Abadi et al. 2016) and yields after every step.

    Every step is charged, also one whose batch is empty: it is noise alone. The gradient is divided by the expected
    batch, `plan.sampling_prob * len(x)`, and the caller charges `steps` to the ledger before it starts.

    Args:
        model: without batch normalisation in training mode.
        loss_fn: outputs and labels of one example to its loss.
        x: raw examples [n, ...], one tensor or several by name; their number n is taken as public.
        y: labels [n].
        plan: of unit "sample".
        steps: how many steps.
        lr: learning rate of plain SGD.
        generator: draws batches and noise; a `RandomSource`, or a torch generator.
        momentum: of SGD, starting at rest; it only mixes noised gradients.
        prepare: raw batch [k, ...] -> network input; every example by itself (no mixup).
        method: row of `gradients.METHODS`; chosen at the first batch unless given. It is compared with the loop on
            real examples of every batch, and gives way to it for the rest of the steps where they differ.
        autocast: type of the forward and backward pass, for instance torch.bfloat16; norms and sums stay float32.

    Raises:
        RecipeError: if the plan protects clients, or a module mixes the samples of a batch.
        PrivacyError: if there are no examples.
    """
    params, velocity = trainable(model), None
    noised = private_gradients(
        model,
        loss_fn,
        x,
        y,
        plan=plan,
        steps=steps,
        generator=generator,
        prepare=prepare,
        method=method,
        autocast=autocast,
    )
    for step, (gradient, raw) in enumerate(noised, start=1):
        velocity = step_(params, gradient, velocity, lr=lr, momentum=momentum)
        yield StepRecord(step, raw)


def private_gradients(
    model: nn.Module,
    loss_fn: LossFn,
    x: Inputs,
    y: Tensor,
    *,
    plan: PrivacyPlan,
    steps: int,
    generator: Source,
    noise: Callable[[Tensor], Source] | None = None,
    prepare: Callable[[Inputs], Inputs] | None = None,
    method: Method | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[Tensor, RawStats]]:
    """Yields the noised mean gradient [d] of each private step, computed when it is asked for; takes no step.

    For the arguments see `private_steps`; `noise` gives the source of a step's noise for the sum [d] that it hides,
    `generator` if None. The noise is in what is yielded: whatever is made of it costs no more privacy.

    Raises:
        RecipeError: if the plan protects clients, or a module mixes the samples of a batch.
        PrivacyError: if there are no examples.
    """
    if plan.unit != "sample":
        raise RecipeError(
            f"got {plan.unit!r}, expected 'sample': only then are steps private", place="plan.unit"
        )
    met = False
    for index in poisson_batches(len(x), plan.sampling_prob, steps, generator):
        batch, labels = x[index], y[index]
        if prepare is not None and len(index):
            batch = prepare(batch)
        if method is None and len(index):
            method = choose_method(model, loss_fn, batch, labels)
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            total, raw = clipped_gradient_sum(
                model,
                loss_fn,
                batch,
                labels,
                clip_norm=plan.clip_norm,
                method=method or "loop",
                verify="losses" if met else "gradients",
                contain=True,
            )
        met = met or len(index) > 0
        if not raw.agreed:
            method = "loop"
        expected = plan.sampling_prob * len(x)
        source = generator if noise is None else noise(total)
        yield noised_mean(total, plan, expected=expected, generator=source), raw


@torch.no_grad()
def step_(
    params: list[nn.Parameter],
    gradient: Tensor,
    velocity: Tensor | None,
    *,
    lr: float,
    momentum: float,
) -> Tensor:
    """Takes a step of SGD with momentum along minus `gradient` [d]; returns the velocity for the next one."""
    direction = gradient if velocity is None else velocity.mul_(momentum).add_(gradient)
    parts = direction.split([p.numel() for p in params])
    for p, part in zip(params, parts, strict=True):
        p.add_(part.view(p.shape).to(p), alpha=-lr)
    return direction
