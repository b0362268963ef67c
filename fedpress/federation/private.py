"""Local steps under sample privacy: noised steps (DP-SGD), or one clipped sum that others noise."""

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
    """The noised steps of the plan: DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1).

    It measures the planned number of steps and how many examples failed (see `Tally`). An algorithm
    corrects the noised gradient, so a correction made of the server's vectors and of earlier noised
    steps is post-processing and costs no privacy.

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps lack.
    """
    settings = work.plan.settings
    plan = check_private(settings, work.plan.privacy)
    params = trainable(model)
    at = next(model.parameters()).device
    question = question_of(model, work)
    chance = work.key.private_stream("prepare", question)
    number = itertools.count(1)
    # Running means of noised gradients are made of noised gradients alone: they cost no privacy.
    optimizer = None if settings.optimizer == "sgd" else optimizer_of(model, work)

    def prepare(x: Inputs) -> Inputs:
        return laid_out(work.plan.prepare(x, chance), model)

    def noise(total: Tensor) -> RandomSource:
        # With the number of the step: the sums of two empty batches are equal, and equal names
        # would give both the same noise.
        hidden = random.fingerprint(next(number), total)
        return work.key.private_stream("noise", question, hidden)

    _seed_dropout_(work, question)
    noised = private_gradients(
        model,
        work.plan.task.loss,
        work.arrays.x.to(at),
        work.arrays.y.to(at),
        plan=plan,
        steps=plan.steps_per_round,
        generator=work.key.private_stream("private", question),
        noise=noise,
        prepare=prepare,
        autocast=torch.bfloat16 if uses_bf16(model, work.plan.settings.precision) else None,
    )
    raw: list[RawStats] = []
    velocity: Tensor | None = None
    detached = [p.detach() for p in params]
    for gradient, record in noised:
        raw.append(record)
        # Views of the flat gradient: what an algorithm adds to them is in `gradient`, too.
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
    """Takes a step of `optimizer` along `gradients`, and leaves the parameters without any."""
    for p, gradient in zip(params, gradients, strict=True):
        p.grad = gradient.to(p)
    optimizer.step()
    for p in params:
        p.grad = None


def joint_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Minus the sum [d] of clipped gradients of a Poisson batch: a client's part of a joint step.

    It yields no step, so an algorithm has none to correct. One example moves the sum by at most the
    plan's clip norm. There is no noise in it: it may leave the client only in a secure sum whose
    noise the clients make, or to a server that is trusted to add the noise.

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps lack.
    """
    # Makes this function a generator, as every source of gradients is.
    yield from ()
    plan = check_private(work.plan.settings, work.plan.privacy)
    at = next(model.parameters()).device
    question = question_of(model, work)
    stream = work.key.private_stream("private", question)
    index = next(poisson_batches(len(work.arrays), plan.sampling_prob, 1, stream))
    x = work.arrays.x[index].to(at)
    y = work.arrays.y[index].to(at)
    # A Poisson batch may be empty: there is nothing to augment, or to choose a method by.
    method: Method = "loop"
    if len(index):
        x = laid_out(work.plan.prepare(x, work.key.private_stream("prepare", question)), model)
        method = choose_method(model, work.plan.task.loss, x, y)
    # Comparing gradients costs more than comparing losses, and a network that mixes examples does
    # so in every round: the first one is checked more closely.
    verify: Verify = "gradients" if work.key.round == 1 else "losses"
    _seed_dropout_(work, question)
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
    """Computes the gradients of one private step over all examples of `work`, which must be public.

    Raises:
        TrainingError: if the network fails on an example, if a gradient is not finite, or if no
            parameter has one.
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
        # A layer that begins with zeros (as in many residual networks) may hide every gradient at
        # the start: then it is tried at other parameters, too.
        if not total.any() and not raw.failed:
            _shake_(model)
            total, raw = clipped_gradient_sum(model, loss, x, y, clip_norm=plan.clip_norm)
    if raw.failed:
        raise TrainingError(
            f"{raw.failed} of {raw.examples} examples failed alone: {raw.problem}",
            place="model",
            cure="let it run on single examples",
        )
    if raw.refused:
        raise TrainingError(
            f"the gradient of {raw.refused} of {raw.examples} examples is NaN or infinite",
            place="model",
            cure="look for a division by 0 or a logarithm of 0 in it",
        )
    if not total.any():
        raise TrainingError(
            "no trained parameter has a gradient, so only noise would move the model",
            place="model",
            cure="let its outputs depend on what is trained",
        )


@torch.no_grad()
def _shake_(model: nn.Module) -> None:
    """Adds a little noise to every trainable parameter."""
    for p in trainable(model):
        p.add_(0.05 * torch.randn_like(p))


def _failures(raw: list[RawStats]) -> Measures:
    """Returns how many examples gave nothing, by cause.

    NOT private: these counts leave a client only with noise, or not at all.
    """
    counts: dict[str, JSON] = {
        "not_finite": sum(one.refused for one in raw),
        "failed": sum(one.failed for one in raw),
    }
    return {cause: count for cause, count in counts.items() if count}


def _seed_dropout_(work: LocalWork, question: str) -> None:
    """Seeds torch's global generator, from which dropout draws; the calling client restores it.

    The stream must be as secret as the batches. A dropout mask belongs to a place in the batch and
    not to an example: if one example is removed, all after it get other masks. Whoever knew the
    masks would therefore see the sum move by more than one clip norm.
    """
    seed_torch_(work.key.private_stream("dropout", question))


def question_of(model: nn.Module, work: LocalWork) -> str:
    """Returns a fingerprint of everything that a private answer is known to depend on.

    It names the streams of batches, augmentation, dropout and noise. The same question gets the
    same answer, bit by bit, which costs no privacy. Any other question, such as other parameters in
    the same round or another noise multiplier under the same seed, gets independent draws.

    The examples are read in every round, so that the name is right also if somebody changed them. A
    gradient may depend on more than can be named (what a network computes, an algorithm's
    corrections of the steps before), so the name of a step's noise also holds the sum it hides.
    """
    state = model.state_dict()
    about = {
        # The printed network names layers without parameters, and settings such as a stride. The
        # addresses of objects in it differ from process to process: left in, a run that goes on
        # would give a second answer to the same question.
        "network": re.sub(r" at 0x[0-9a-fA-F]+", "", str(model)),
        "state": [*state],
        "trained": parameters.Layout.of(model),
        "settings": work.plan.settings,
        "plan": work.plan.privacy,
        "prepare": work.plan.prepare,
        "task": work.plan.task,
        # The first name of the penalties: a new one would change the noise of every run.
        "pulls": dict(work.plan.penalties),
        "beside": sorted(work.beside),
    }
    beside = [work.beside[name] for name in sorted(work.beside)]
    return random.fingerprint(
        about, *state.values(), *model.buffers(), work.arrays.x, work.arrays.y, *beside
    )


def check_private(settings: LocalSettings, plan: PrivacyPlan | None) -> PrivacyPlan:
    """Returns `plan`, if `settings` can run as private steps under it.

    Raises:
        RecipeError: if they cannot.
    """
    if plan is None or plan.unit != "sample":
        raise RecipeError(
            "private steps need a plan of unit 'sample'",
            place="privacy",
            cure="give one, or leave privacy out",
        )
    # The steps of DP-SGD here are the noised gradient alone.
    if settings.weight_decay:
        raise RecipeError(
            "not offered with sample privacy", place="weight_decay", cure="set it to 0"
        )
    return plan
