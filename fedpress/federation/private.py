"""Local steps under sample privacy: noised steps of each client's own, or one gradient sum that is noised elsewhere."""

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
from fedpress.federation.local import LocalSettings, LocalWork, Measures, Outcome, Step, Steps
from fedpress.privacy.noise.mechanism import poisson_batches
from fedpress.privacy.per_example.gradients import (
    RawStats,
    Verify,
    choose_method,
    clipped_gradient_sum,
)
from fedpress.privacy.per_example.sgd import private_gradients, step_
from fedpress.privacy.plan import PrivacyPlan
from fedpress.training.device import laid_out, uses_bf16


def private_steps(model: nn.Module, work: LocalWork) -> Steps:
    """The noised steps of the plan (DP-SGD); measures their planned number and what failed (see `Tally`).

    What an algorithm adds to a gradient is added to the noised one, so a correction made of the
    server's vectors and of earlier noised steps costs no privacy.

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps do not
            know.
    """
    plan = check_private(work.plan.settings, work.plan.privacy)
    params, at, question = (
        trainable(model),
        next(model.parameters()).device,
        question_of(model, work),
    )
    chance, number = work.key.private_stream("prepare", question), itertools.count(1)

    def prepare(x: Inputs) -> Inputs:
        return laid_out(work.plan.prepare(x, chance), model)

    def noise(total: Tensor) -> RandomSource:
        # The number of the step: two sums may be the same, as those of empty batches are.
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
        parts = gradient.split([p.numel() for p in params])
        yield Step(detached, [part.view(p.shape) for p, part in zip(params, parts, strict=True)])
        velocity = step_(
            params, gradient, velocity, lr=work.lr, momentum=work.plan.settings.momentum
        )
    return Outcome({"steps": plan.steps_per_round, **_failures(raw)})


def joint_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Minus the sum [d] of clipped gradients of one Poisson batch: a client's part of a joint noised step.

    No step is taken here, so there is none to correct. One example moves the sum by at most the
    plan's clip norm. No noise is in it: it must leave the client in a secure sum with noise, or to
    a server that is trusted to add it.

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps do not
            know.
    """
    yield from ()
    plan = check_private(work.plan.settings, work.plan.privacy)
    at, question = next(model.parameters()).device, question_of(model, work)
    batches = poisson_batches(
        len(work.arrays), plan.sampling_prob, 1, work.key.private_stream("private", question)
    )
    index = next(batches)
    x, y = work.arrays.x[index].to(at), work.arrays.y[index].to(at)
    if len(index):
        x = laid_out(work.plan.prepare(x, work.key.private_stream("prepare", question)), model)
    method = choose_method(model, work.plan.task.loss, x, y) if len(index) else "loop"
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
            contain=True,
        )
    return Outcome({"steps": 1, **_failures([raw])}, -total.cpu())


def rehearse_private(model: nn.Module, work: LocalWork) -> None:
    """Takes the gradients of one private step over all examples of `work`, which must be public.

    Raises:
        TrainingError: if the network fails on some example, if a gradient is not finite, or if
            nothing has one.
        RecipeError: see `clipped_gradient_sum`.
    """
    plan = check_private(work.plan.settings, work.plan.privacy)
    at = next(model.parameters()).device
    x, y = work.arrays.x.to(at), work.arrays.y.to(at)
    x = laid_out(work.plan.prepare(x, work.key.client_stream("prepare")), model)
    method, bf16 = (
        choose_method(model, work.plan.task.loss, x, y),
        uses_bf16(model, work.plan.settings.precision),
    )
    with torch.autocast(at.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16):
        total, raw = clipped_gradient_sum(
            model,
            work.plan.task.loss,
            x,
            y,
            clip_norm=plan.clip_norm,
            method=method,
            verify="gradients",
        )
        if (
            not total.any() and not raw.failed
        ):  # a layer of zeros may hide every gradient at the start
            with torch.no_grad():
                for p in trainable(model):
                    p.add_(0.05 * torch.randn_like(p))
            total, raw = clipped_gradient_sum(
                model, work.plan.task.loss, x, y, clip_norm=plan.clip_norm
            )
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


def _failures(raw: list[RawStats]) -> Measures:
    """Returns how many examples gave nothing, by cause. NOT private: it leaves a client with noise or not at all."""
    counts: dict[str, JSON] = {
        "not_finite": sum(one.refused for one in raw),
        "failed": sum(one.failed for one in raw),
    }
    return {cause: count for cause, count in counts.items() if count}


def _seed_dropout_(work: LocalWork, question: str) -> None:
    """Starts the stream of dropout, which draws from torch's global generator; the client that called puts it back.

    It must be as secret as the batches are. A mask is drawn for a place in a batch and not for an
    example: without one example all after it have other masks, so who knew the masks would see more
    of the sum move than the clip norm.
    """
    seed_torch_(work.key.private_stream("dropout", question))


def question_of(model: nn.Module, work: LocalWork) -> str:
    """Names all that a private answer is known to depend on, for its batches, augmentation, dropout and noise.

    The same question gets the same answer, bit by bit, which costs no privacy. Any other one, such
    as other parameters in the same round or another noise multiplier under the same seed, is
    answered by independent draws. The examples are read again every round, so that the name holds
    also if somebody changed them. A gradient may depend on more than can be named (what a network
    computes, an algorithm's corrections of the steps before), so the name of a step's noise also
    holds the sum that it hides.
    """
    state = model.state_dict()
    about = {
        # Layers without parameters, and settings such as a stride; where an object lies says
        # nothing, and is another place in every process: a run that goes on would get a second
        # answer to the same question.
        "network": re.sub(r" at 0x[0-9a-fA-F]+", "", str(model)),
        "state": [*state],
        "trained": parameters.Layout.of(model),
        "settings": work.plan.settings,
        "plan": work.plan.privacy,
        "prepare": work.plan.prepare,
        "task": work.plan.task,
        "pulls": dict(work.plan.penalties),
        "beside": sorted(work.beside),
    }
    beside = [work.beside[name] for name in sorted(work.beside)]
    return random.fingerprint(
        about, *state.values(), *model.buffers(), work.arrays.x, work.arrays.y, *beside
    )


def check_private(settings: LocalSettings, plan: PrivacyPlan | None) -> PrivacyPlan:
    """Returns `plan`; RecipeError unless `settings` can run as private steps under it."""
    if plan is None or plan.unit != "sample":
        raise RecipeError(
            "private steps need a plan of unit 'sample'",
            place="privacy",
            cure="give one, or leave privacy out",
        )
    if settings.weight_decay:
        raise RecipeError(
            "not offered with sample privacy", place="weight_decay", cure="set it to 0"
        )
    return plan
