"""DP-SGD on one client's data, as a generator that yields after every step."""

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
    """One private step.

    Attributes:
        step: number of the step, from 1.
        raw: statistics without noise. They may be shown on the client but must not leave it.
    """

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
    """Trains the parameters of `model` in place by DP-SGD and yields after every step.

    Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1; the noised sum is divided by the expected
    batch `plan.sampling_prob * len(x)`. The caller charges all `steps` to the ledger beforehand,
    also those whose batch turns out empty: they add noise alone.

    Args:
        model: without batch normalisation in training mode.
        loss_fn: outputs and labels of one example -> its loss.
        x: raw examples [n, ...], one tensor or several by name; their number n counts as public.
        y: labels [n].
        plan: clip norm, sampling and noise; of unit "sample".
        steps: number of steps.
        lr: learning rate of plain SGD.
        generator: draws batches and noise; a `RandomSource`, or a torch generator.
        momentum: of SGD, starting at 0. It only mixes noised gradients, so it costs no privacy.
        prepare: raw batch [k, ...] -> network input. It must treat every example by itself, so no
            mixup.
        method: row of `gradients.METHODS`; None chooses at the first batch. Some examples of every
            batch are compared with the plain loop; after a mismatch it does all further steps.
        autocast: type of the forward and backward pass, for instance torch.bfloat16; norms and sums
            stay float32.

    Raises:
        RecipeError: if the plan protects clients, or a module mixes the samples of a batch.
        PrivacyError: if there are no examples.
    """
    params = trainable(model)
    velocity = None
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
        velocity = sgd_step_(params, gradient, velocity, lr=lr, momentum=momentum)
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
    """Yields the noised mean gradient [d] of each private step; takes no step.

    A gradient is computed when it is asked for, at the model's parameters of that moment. For the
    arguments see `private_steps`. `noise` takes the sum of clipped gradients [d] and returns the
    source of the noise that hides it, so a caller can give every sum noise of its own; None takes
    `generator`.

    Raises:
        RecipeError: if the plan protects clients, or a module mixes the samples of a batch.
        PrivacyError: if there are no examples.
    """
    if plan.unit != "sample":
        raise RecipeError(
            f"got {plan.unit!r}, expected 'sample': only then are steps private", place="plan.unit"
        )
    checked = False
    expected = plan.sampling_prob * len(x)
    for index in poisson_batches(len(x), plan.sampling_prob, steps, generator):
        batch = x[index]
        labels = y[index]
        # Not all networks can run on an empty batch; its sum is zero anyway.
        if prepare is not None and len(index):
            batch = prepare(batch)
        if method is None and len(index):
            method = choose_method(model, loss_fn, batch, labels)
        # Without a first example no method is chosen yet, and the loop returns zeros.
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            total, raw = clipped_gradient_sum(
                model,
                loss_fn,
                batch,
                labels,
                clip_norm=plan.clip_norm,
                method=method or "loop",
                # Gradients of single examples cost most, so they are compared once only.
                verify="losses" if checked else "gradients",
                # A refusal here would be seen outside, and one example could cause it.
                tolerate_writes=True,
            )
        checked = checked or len(index) > 0
        # A network that mixed examples once may do so again on examples that are not compared.
        if not raw.agreed:
            method = "loop"
        source = generator if noise is None else noise(total)
        yield noised_mean(total, plan, expected=expected, generator=source), raw


@torch.no_grad()
def sgd_step_(
    params: list[nn.Parameter],
    gradient: Tensor,
    velocity: Tensor | None,
    *,
    lr: float,
    momentum: float,
) -> Tensor:
    """Takes a step of SGD with momentum along minus `gradient` [d].

    Args:
        params: the parameters, changed in place.
        gradient: noised mean gradient [d].
        velocity: what the last step returned, changed in place; None at the first step.
        lr: learning rate.
        momentum: share of the last velocity that is kept.

    Returns:
        The velocity [d] for the next step.
    """
    direction = gradient
    if velocity is not None:
        direction = velocity.mul_(momentum).add_(gradient)
    parts = direction.split([p.numel() for p in params])
    for p, part in zip(params, parts, strict=True):
        p.add_(part.view(p.shape).to(p), alpha=-lr)
    return direction
