"""DP-SGD on one client's data: generators that yield noised gradients, or train step by step."""

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
    """What is known about one private step.

    Attributes:
        step: number of the step, from 1.
        raw: statistics of the batch WITHOUT noise: they must not leave the client.
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

    Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1. The noised sum is divided by the expected
    batch size `plan.sampling_prob * len(x)`. The caller must charge all `steps` to the privacy
    ledger before the first step, including steps whose batch may be empty.

    Args:
        model: the network, without batch normalisation in training mode.
        loss_fn: outputs and labels of one example -> its loss.
        x: raw examples [n, ...], one tensor or several by name; n is treated as public.
        y: labels [n].
        plan: clip norm, sampling and noise; its unit must be "sample".
        steps: number of steps.
        lr: learning rate of SGD.
        generator: draws batches and noise; a `RandomSource`, or a torch generator.
        momentum: momentum of SGD. It combines noised gradients only, so it costs no privacy.
        prepare: raw batch [k, ...] -> network input; None: raw examples are the input. An example's
            input must not depend on other examples, so mixup is not allowed.
        method: name in `gradients.METHODS`; None: chosen at the first batch. Some examples of every
            batch are compared with the method "loop", which has one backward pass per example.
            After a mismatch all further steps use the loop.
        autocast: type of forward and backward passes, such as torch.bfloat16; norms and sums stay
            float32.

    Yields:
        A record after every step.

    Raises:
        RecipeError: if the plan's unit is "client", or a module mixes the samples of a batch.
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
    """Yields the noised mean gradient [d] of each private step; does not change the parameters.

    Each gradient is computed at the model's current parameters, when the caller asks for it. The
    arguments are those of `private_steps`, and `noise`: a function from the sum of clipped
    gradients [d] to the random source of its noise, so that every sum can have its own stream. If
    `noise` is None, all noise comes from `generator`.

    Yields:
        The gradient, and statistics of the batch WITHOUT noise, which must not leave the client.

    Raises:
        RecipeError: if the plan's unit is "client", or a module mixes the samples of a batch.
        PrivacyError: if there are no examples.
    """
    if plan.unit != "sample":
        raise RecipeError(
            f"got {plan.unit!r}, expected 'sample': only then are steps private", place="plan.unit"
        )
    checked = False
    # The divisor is a constant. The actual batch size is private.
    expected = plan.sampling_prob * len(x)
    for index in poisson_batches(len(x), plan.sampling_prob, steps, generator):
        batch = x[index]
        labels = y[index]
        # Many networks cannot run on an empty batch. Its sum is zero.
        if prepare is not None and len(index):
            batch = prepare(batch)
        if method is None and len(index):
            method = choose_method(model, loss_fn, batch, labels)
        # Before the first example there is no method; for empty batches the loop returns zeros.
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            total, raw = clipped_gradient_sum(
                model,
                loss_fn,
                batch,
                labels,
                clip_norm=plan.clip_norm,
                method=method or "loop",
                # Comparing gradients is slow, so it is done at the first batch only.
                verify="losses" if checked else "gradients",
                # An error here would be visible outside, and a single example could cause it.
                tolerate_writes=True,
            )
        checked = checked or len(index) > 0
        # A network that mixes examples may also mix examples that are not compared.
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
    """Takes one step of SGD with momentum against `gradient` [d].

    Args:
        params: the parameters, changed in place.
        gradient: noised mean gradient [d].
        velocity: velocity that the last step returned, changed in place; None at the first step.
        lr: learning rate.
        momentum: factor on the last velocity.

    Returns:
        The velocity [d] for the next step.
    """
    # As in torch.optim.SGD, the first velocity is the gradient itself.
    direction = gradient
    if velocity is not None:
        direction = velocity.mul_(momentum).add_(gradient)
    parts = direction.split([p.numel() for p in params])
    for p, part in zip(params, parts, strict=True):
        p.add_(part.view(p.shape).to(p), alpha=-lr)
    return direction
