"""Local training that protects single examples: DP-SGD, or one clipped sum of gradients.

In DP-SGD the client adds noise in every step. The clipped sum gets its noise later, from all
clients together or from the server.
"""

from __future__ import annotations

import itertools
import re

import torch
from torch import Tensor, nn

from fedpress.core import parameters, random
from fedpress.core.canonical import JSON
from fedpress.core.inputs import Inputs
from fedpress.core.parameters import trainable
from fedpress.core.random_source import RandomSource, seed_torch_
from fedpress.errors import RecipeError, TrainingError
from fedpress.federation.local import (
    LocalSettings,
    LocalWork,
    Measures,
    Outcome,
    Step,
    Steps,
    optimizer_of,
)
from fedpress.privacy.noise.mechanism import poisson_batches
from fedpress.privacy.per_example.gradients import (
    Method,
    RawStats,
    Verify,
    choose_method,
    clipped_gradient_sum,
)
from fedpress.privacy.per_example.sgd import private_gradients, sgd_step_
from fedpress.privacy.plan import PrivacyPlan
from fedpress.training.device import laid_out, uses_bf16


def private_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Takes the planned number of DP-SGD steps (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    The outcome's measures are the number of steps and the counts of failed examples (see `Tally`).
    When a step is yielded, its gradient has its noise already, and an algorithm may change it. A
    change that is computed from the server's vectors and earlier noised steps is post-processing
    and costs no privacy.

    Args:
        model: the model to train.
        work: the client's training in this round.

    Yields:
        Each step after its noised gradient is computed.

    Raises:
        RecipeError: if the plan does not protect single examples (unit "sample"), or if the
            settings have a weight decay.
    """
    settings = work.plan.settings
    plan = check_private(settings, work.plan.privacy)
    params = trainable(model)
    at = next(model.parameters()).device
    inputs = inputs_fingerprint(model, work)
    chance = work.key.private_stream("prepare", inputs)
    number = itertools.count(1)
    # Adam's running means are computed from noised gradients only, so they cost no privacy.
    optimizer = None if settings.optimizer == "sgd" else optimizer_of(model, work)

    def prepare(x: Inputs) -> Inputs:
        return laid_out(work.plan.prepare(x, chance), model)

    def noise(total: Tensor) -> RandomSource:
        # The name of the stream contains the number of the step: the sums of two empty batches are
        # equal, and without the number both would get the same noise.
        hidden = random.fingerprint(next(number), total)
        return work.key.private_stream("noise", inputs, hidden)

    _seed_dropout_(work, inputs)
    noised = private_gradients(
        model,
        work.plan.task.loss,
        work.arrays.x.to(at),
        work.arrays.y.to(at),
        plan=plan,
        steps=plan.steps_per_round,
        generator=work.key.private_stream("private", inputs),
        noise=noise,
        prepare=prepare,
        autocast=torch.bfloat16 if uses_bf16(model, work.plan.settings.precision) else None,
    )
    raw: list[RawStats] = []
    velocity: Tensor | None = None
    detached = [p.detach() for p in params]
    for gradient, record in noised:
        raw.append(record)
        # Views of the flat gradient, so that an algorithm's changes reach `gradient` as well.
        flat = gradient.split([p.numel() for p in params])
        parts = [part.view(p.shape) for p, part in zip(params, flat, strict=True)]
        yield Step(detached, parts)
        if optimizer is None:
            velocity = sgd_step_(params, gradient, velocity, lr=work.lr, momentum=settings.momentum)
        else:
            _step_along_(optimizer, params, parts)
    return Outcome({"steps": plan.steps_per_round, **_failures(raw)})


def _step_along_(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], gradients: list[Tensor]
) -> None:
    """Takes a step of `optimizer` with `gradients`, and resets the parameters' `grad` to None."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.to(p)
    optimizer.step()
    for p in params:
        p.grad = None


def joint_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Computes one client's part of a DP-SGD step that all clients take together.

    The update is minus the sum [d] of the clipped gradients of a Poisson batch; no `Step` is
    yielded. One example moves the sum by at most the plan's clip norm. The sum contains NO noise.
    So it may leave the client only in a secure sum to which the clients add noise, or to a server
    that is trusted to add the noise.

    Args:
        model: the model to train.
        work: the client's training in this round.

    Raises:
        RecipeError: if the plan does not protect single examples (unit "sample"), or if the
            settings have a weight decay.
    """
    # A gradient source is a generator; this line makes the function one.
    yield from ()
    plan = check_private(work.plan.settings, work.plan.privacy)
    at = next(model.parameters()).device
    inputs = inputs_fingerprint(model, work)
    stream = work.key.private_stream("private", inputs)
    index = next(poisson_batches(len(work.arrays), plan.sampling_prob, 1, stream))
    x = work.arrays.x[index].to(at)
    y = work.arrays.y[index].to(at)
    # A Poisson batch may be empty: then there is nothing to augment, and no example by which to
    # choose the method.
    method: Method = "loop"
    if len(index):
        x = laid_out(work.plan.prepare(x, work.key.private_stream("prepare", inputs)), model)
        method = choose_method(model, work.plan.task.loss, x, y)
    # Per-example gradients are verified against single runs. Comparing gradients is stricter than
    # comparing losses but slower, so it is done in the first round only: a network that mixes
    # examples mixes them in every round.
    verify: Verify = "gradients" if work.key.round == 1 else "losses"
    _seed_dropout_(work, inputs)
    bf16 = uses_bf16(model, work.plan.settings.precision)
    with torch.autocast(at.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16):
        total, raw = clipped_gradient_sum(
            model,
            work.plan.task.loss,
            x,
            y,
            clip_norm=plan.clip_norm,
            method=method,
            verify=verify,
            tolerate_writes=True,
        )
    return Outcome({"steps": 1, **_failures([raw])}, -total.cpu())


def rehearse_private(model: nn.Module, work: LocalWork) -> None:
    """Computes the gradients of one private step, to test the model on public examples.

    Args:
        model: the model to train.
        work: training on public examples. They must be public, because errors tell what failed.

    Raises:
        TrainingError: if the network fails on an example, if a gradient is not finite, or if no
            parameter has a gradient.
        RecipeError: see `clipped_gradient_sum`.
    """
    plan = check_private(work.plan.settings, work.plan.privacy)
    at = next(model.parameters()).device
    x = work.arrays.x.to(at)
    y = work.arrays.y.to(at)
    x = laid_out(work.plan.prepare(x, work.key.client_stream("prepare")), model)
    loss = work.plan.task.loss
    method = choose_method(model, loss, x, y)
    bf16 = uses_bf16(model, work.plan.settings.precision)
    with torch.autocast(at.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16):
        total, raw = clipped_gradient_sum(
            model, loss, x, y, clip_norm=plan.clip_norm, method=method, verify="gradients"
        )
        # A layer that is initialised with zeros (as in many residual networks) may make every
        # gradient zero at the start. So the model is then tried again with changed parameters.
        if not total.any() and not raw.failed:
            _perturb_(model)
            total, raw = clipped_gradient_sum(model, loss, x, y, clip_norm=plan.clip_norm)
    if raw.failed:
        raise TrainingError(
            f"{raw.failed} of {raw.examples} examples failed in a batch of one: {raw.problem}",
            place="model",
            cure="change the model so that it runs on single examples",
        )
    if raw.refused:
        raise TrainingError(
            f"the gradient of {raw.refused} of {raw.examples} examples is NaN or infinite",
            place="model",
            cure="look for a division by 0 or a logarithm of 0 in the model",
        )
    if not total.any():
        raise TrainingError(
            "no trained parameter has a gradient, so only noise would move the model",
            place="model",
            cure="change the model so that its outputs depend on trained parameters",
        )


@torch.no_grad()
def _perturb_(model: nn.Module) -> None:
    """Adds noise of standard deviation 0.05 to every trainable parameter."""
    for p in trainable(model):
        p.add_(0.05 * torch.randn_like(p))


def _failures(raw: list[RawStats]) -> Measures:
    """Returns the numbers of failed examples by cause.

    NOT private: these counts may leave a client only with noise.
    """
    counts: dict[str, JSON] = {
        "not_finite": sum(one.refused for one in raw),
        "failed": sum(one.failed for one in raw),
    }
    return {cause: count for cause, count in counts.items() if count}


def _seed_dropout_(work: LocalWork, inputs: str) -> None:
    """Seeds torch's global generator, from which dropout draws; the calling client restores it.

    The seed must be secret, like the choice of batches. A dropout mask belongs to a position in the
    batch, not to an example: if one example is removed, all later examples get other masks. If an
    attacker knew the masks, one example would move the sum by more than one clip norm.
    """
    seed_torch_(work.key.private_stream("dropout", inputs))


def inputs_fingerprint(model: nn.Module, work: LocalWork) -> str:
    """Returns a fingerprint of all known inputs of a private answer: model, settings, examples.

    The random streams for batches, augmentation, dropout and noise are named by this fingerprint.
    Equal inputs give the same answer bit for bit, which costs no privacy. Different inputs (such as
    other parameters in the same round, or another noise multiplier under the same seed) get
    independent randomness.

    The training examples are hashed in every round, in case they were changed. A gradient may also
    depend on inputs that are not known here (code of the network, an algorithm's changes of earlier
    steps). Therefore the random stream of a step's noise is also named by the sum to which the
    noise is added.
    """
    state = model.state_dict()
    about = {
        # The printed network has layers without parameters, and settings such as a stride. Memory
        # addresses are removed from it: they differ between processes, so a resumed run would give
        # another answer to the same request, which would cost privacy.
        "network": re.sub(r" at 0x[0-9a-fA-F]+", "", str(model)),
        "state": [*state],
        "trained": parameters.Layout.of(model),
        "settings": work.plan.settings,
        "plan": work.plan.privacy,
        "prepare": work.plan.prepare,
        "task": work.plan.task,
        # "pulls" and "beside" are older names of the penalties and extras. They are kept, because
        # other keys would change the noise of every run.
        "pulls": dict(work.plan.penalties),
        "beside": sorted(work.extras),
    }
    extras = [work.extras[name] for name in sorted(work.extras)]
    return random.fingerprint(
        about, *state.values(), *model.buffers(), work.arrays.x, work.arrays.y, *extras
    )


def check_private(settings: LocalSettings, plan: PrivacyPlan | None) -> PrivacyPlan:
    """Returns `plan` after checking that DP-SGD is possible with this plan and these settings.

    Raises:
        RecipeError: if the plan does not protect single examples (unit "sample"), or if the
            settings have a weight decay.
    """
    if plan is None or plan.unit != "sample":
        raise RecipeError(
            "private steps need a plan of unit 'sample'",
            place="privacy",
            cure="give one, or leave privacy out",
        )
    # DP-SGD here steps along the noised gradient only; it has no term for weight decay.
    if settings.weight_decay:
        raise RecipeError(
            "not offered with sample privacy", place="weight_decay", cure="set it to 0"
        )
    return plan
