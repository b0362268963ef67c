"""What a client does with the model on its own examples: plain SGD (with FedProx's pull), or private SGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedpress.codecs import Key
from fedpress.core import parameters, random
from fedpress.core.examples import Arrays
from fedpress.core.parameters import trainable
from fedpress.errors import DivergedError, RecipeError, TrainingError
from fedpress.nn.batch_norm import ONE_VALUE, averages_batches
from fedpress.nn.quantized import step_sizes
from fedpress.privacy.noise.mechanism import poisson_batches
from fedpress.privacy.per_example.gradients import (
    RawStats,
    Verify,
    choose_method,
    clipped_gradient_sum,
)
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan
from fedpress.training.device import Precision, autocast, memory_format, uses_bf16
from fedpress.training.evaluate import outputs
from fedpress.wire.message import JSON

Prepare: TypeAlias = "Callable[[Tensor, torch.Generator], Tensor]"


class LocalSettings(BaseModel):
    """How a client trains in one round; under sample privacy the plan's steps take the place of `epochs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.05, gt=0)
    lr_decay: float = Field(default=1.0, gt=0, le=1, description="factor on lr after every round")
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    proximal_mu: float = Field(
        default=0.0, ge=0, description="FedProx: strength of the pull back to the server's model"
    )
    precision: Precision = "float32"


@dataclass(frozen=True, eq=False)
class Task:
    """One client's work in one round: its examples, the settings, and the key from which all its randomness comes.

    `prepare(x, generator)` turns raw examples [k, ...] into the network's input, each by itself; `plan` is this
    client's own under unit "sample".
    """

    arrays: Arrays
    settings: LocalSettings
    key: Key
    prepare: Prepare
    plan: PrivacyPlan | None = None

    @property
    def lr(self) -> float:
        """The learning rate of this round."""
        return self.settings.lr * self.settings.lr_decay ** (self.key.round - 1)


class LocalUpdate(Protocol):
    """Trains in place; measures what it can without looking at who may see it."""

    def __call__(self, model: nn.Module, task: Task) -> dict[str, JSON]:
        """Changes the parameters of `model` and returns measures: `steps`, and `loss` where it may be known."""
        ...


def sgd(model: nn.Module, task: Task) -> dict[str, JSON]:
    """Runs epochs of SGD over shuffled batches; with `proximal_mu` it is FedProx (Li et al. 2020, arXiv:1812.06127).

    Raises:
        DivergedError: if the loss is not finite.
        TrainingError: if there is one example only, which leaves a batch norm nothing to average.
    """
    s, params, shuffle, chance = (
        task.settings,
        trainable(model),
        task.key.client_stream("shuffle"),
        task.key.client_stream("prepare"),
    )
    spared = step_sizes(model)  # the grids of quantized layers: decay would only draw them in
    groups = [
        {"params": [p for p in params if id(p) not in spared], "weight_decay": s.weight_decay},
        {"params": [p for p in params if id(p) in spared], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], task.lr, s.momentum)
    anchor = [p.detach().clone() for p in params] if s.proximal_mu else []
    total, steps = torch.zeros((), dtype=torch.float64), 0
    for _ in range(s.epochs):
        for index in shuffled_batches(model, len(task.arrays), s.batch_size, shuffle):
            loss = _loss(model, task, task.arrays.take(index), chance)
            optimizer.zero_grad()
            loss.backward()
            for p, start in zip(params, anchor, strict=False):  # no anchor, no pull
                if p.grad is not None:
                    p.grad.add_(p.detach() - start, alpha=s.proximal_mu)
            optimizer.step()
            total, steps = total + loss.detach().double().cpu(), steps + 1
            if not torch.isfinite(total):
                raise _diverged(task, index, steps)
    return {"loss": float(total) / steps, "steps": steps}


def _diverged(task: Task, index: Tensor, steps: int) -> DivergedError:
    """Returns the error of a loss that is not finite: because of the examples at `index`, or of the learning rate."""
    broken = not bool(torch.isfinite(task.arrays.x[index]).all())
    data = ", or rather mend the examples: they hold NaN or infinite values" if broken else ""
    return DivergedError(
        f"local update: after {steps} steps the loss is not finite in round {task.key.round}; "
        f"lower {too_large(task.settings, task.lr)}{data}"
    )


def too_large(settings: LocalSettings, lr: float, place: str = "federate") -> str:
    """Names the settings that make local training diverge: the rate, and each pull that overshoots at this rate.

    >>> too_large(LocalSettings(lr=0.5, weight_decay=9.0), 0.5)
    'federate.lr (now 0.5) or federate.weight_decay (now 9)'
    """
    pulls = [(name, getattr(settings, name)) for name in ("proximal_mu", "weight_decay")]
    named = [("lr", lr), *((name, value) for name, value in pulls if lr * value >= 2)]
    return " or ".join(f"{place}.{name} (now {value:g})" for name, value in named)


def shuffled_batches(model: nn.Module, n: int, size: int, shuffle: torch.Generator) -> list[Tensor]:
    """Returns one epoch over `n` examples: int64 index tensors of `size` examples, the last one with what is left.

    A single example has no statistics for a batch norm in training mode: if the last batch holds one, it joins the
    batch before.
    """
    batches = list(torch.randperm(n, generator=shuffle).split(size))
    alone = size > 1 and len(batches) > 1 and len(batches[-1]) == 1
    if alone and averages_batches(model):
        return [*batches[:-2], torch.cat(batches[-2:])]
    return batches


def _loss(model: nn.Module, task: Task, batch: Arrays, chance: torch.Generator) -> Tensor:
    at = next(model.parameters()).device
    x = task.prepare(batch.x.to(at), chance)
    with autocast(model, task.settings.precision):
        try:
            logits = outputs(model, x.contiguous(memory_format=memory_format(x, model)))
        except ValueError as problem:
            if len(x) > 1 or ONE_VALUE not in str(problem):
                raise
            cure = (
                "leave this client out"
                if len(task.arrays) == 1
                else "take federate.batch_size = 2 or more"
            )
            raise TrainingError(
                f"local update: a batch of one example leaves a batch norm nothing to average; {cure}, or set "
                "federate.norm = 'frozen'"
            ) from problem
    return F.cross_entropy(logits.float(), batch.y.to(at))


def private_sgd(model: nn.Module, task: Task) -> dict[str, JSON]:
    """Takes the noised steps of the task's plan (DP-SGD); measures their planned number and what failed (see `Tally`).

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps do not know.
    """
    plan = check_private(task.settings, task.plan)
    at, question = next(model.parameters()).device, _question(model, task)
    chance = task.key.private_stream("prepare", question)

    def prepare(x: Tensor) -> Tensor:
        x = task.prepare(x, chance)
        return x.contiguous(memory_format=memory_format(x, model))

    steps = private_steps(
        model,
        _loss_of,
        task.arrays.x.to(at),
        task.arrays.y.to(at),
        plan=plan,
        steps=plan.steps_per_round,
        lr=task.lr,
        momentum=task.settings.momentum,
        generator=task.key.noise_source("private", question),
        prepare=prepare,
        autocast=torch.bfloat16 if uses_bf16(model, task.settings.precision) else None,
    )
    with torch.random.fork_rng():  # dropout draws from torch's global generators
        torch.manual_seed(task.key.client_stream("dropout", question).initial_seed())
        raw = [record.raw for record in steps]
    return {"steps": plan.steps_per_round, **_failures(raw)}


def rehearse_private(model: nn.Module, task: Task) -> None:
    """Takes the gradients of one private step over all examples of `task`, which must be public.

    Raises:
        TrainingError: if the network fails on some example, if a gradient is not finite, or if nothing has one.
        RecipeError: see `clipped_gradient_sum`.
    """
    plan = check_private(task.settings, task.plan)
    at = next(model.parameters()).device
    x, y = task.arrays.x.to(at), task.arrays.y.to(at)
    x = task.prepare(x, task.key.client_stream("prepare"))
    x = x.contiguous(memory_format=memory_format(x, model))
    method, bf16 = choose_method(model, _loss_of, x, y), uses_bf16(model, task.settings.precision)
    with torch.autocast(at.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16):
        total, raw = clipped_gradient_sum(
            model, _loss_of, x, y, clip_norm=plan.clip_norm, method=method, verify="gradients"
        )
        if (
            not total.any() and not raw.failed
        ):  # a layer of zeros may hide every gradient at the start
            with torch.no_grad():
                for p in trainable(model):
                    p.add_(0.05 * torch.randn_like(p))
            total, raw = clipped_gradient_sum(model, _loss_of, x, y, clip_norm=plan.clip_norm)
    if raw.failed:
        raise TrainingError(f"{raw.failed} of {raw.examples} examples failed alone: {raw.problem}")
    if raw.refused:
        raise TrainingError(
            f"the gradient of {raw.refused} of {raw.examples} examples is NaN or infinite"
        )
    if not total.any():
        raise TrainingError(
            "no trained parameter has a gradient, so only noise would move the model"
        )


def joint_gradient(model: nn.Module, task: Task) -> tuple[Tensor, dict[str, JSON]]:
    """Returns minus the sum [d] of clipped gradients of one Poisson batch, on the CPU: a part of a joint noised step.

    One example moves it by at most the plan's clip norm. No noise is in it: it must leave the client in a secure sum
    with noise, or to a server that is trusted to add it.

    Raises:
        RecipeError: if there is no plan of unit "sample", or a setting that private steps do not know.
    """
    plan = check_private(task.settings, task.plan)
    at, question = next(model.parameters()).device, _question(model, task)
    batches = poisson_batches(
        len(task.arrays), plan.sampling_prob, 1, task.key.noise_source("private", question)
    )
    index = next(batches)
    x, y = task.arrays.x[index].to(at), task.arrays.y[index].to(at)
    if len(index):
        x = task.prepare(x, task.key.private_stream("prepare", question))
        x = x.contiguous(memory_format=memory_format(x, model))
    method = choose_method(model, _loss_of, x, y) if len(index) else "loop"
    verify: Verify = "gradients" if task.key.round == 1 else "losses"
    with torch.random.fork_rng():  # dropout draws from torch's global generators
        torch.manual_seed(task.key.client_stream("dropout", question).initial_seed())
        bf16 = uses_bf16(model, task.settings.precision)
        with torch.autocast(at.type, dtype=torch.bfloat16 if bf16 else None, enabled=bf16):
            total, raw = clipped_gradient_sum(
                model,
                _loss_of,
                x,
                y,
                clip_norm=plan.clip_norm,
                method=method,
                verify=verify,
                contain=True,
            )
    return -total.cpu(), {"steps": 1, **_failures([raw])}


def _failures(raw: list[RawStats]) -> dict[str, JSON]:
    """Returns how many examples gave nothing, by cause. NOT private: it leaves a client with noise or not at all."""
    counts: dict[str, JSON] = {
        "not_finite": sum(one.refused for one in raw),
        "failed": sum(one.failed for one in raw),
    }
    return {cause: count for cause, count in counts.items() if count}


def _loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float(), labels)


def _question(model: nn.Module, task: Task) -> str:
    """Names all that a private answer depends on; as part of the noise's key it keeps one noise from hiding two things.

    The same question gets the same answer, bit by bit, which costs no privacy. Any other one, such as other parameters
    in the same round or another noise multiplier under the same seed, gets independent noise. The examples are read
    again every round, so that the name holds also if somebody changed them.
    """
    state = model.state_dict()
    settings = (
        model,
        parameters.Layout.of(model),
        task.settings,
        task.plan,
        task.prepare,
        [*state],
    )
    return random.fingerprint(
        *settings, *state.values(), *model.buffers(), task.arrays.x, task.arrays.y
    )


def check_private(settings: LocalSettings, plan: PrivacyPlan | None) -> PrivacyPlan:
    """Returns `plan`; RecipeError unless `settings` can run as private steps under it."""
    if plan is None or plan.unit != "sample":
        raise RecipeError(
            "federate.privacy: private_sgd needs a plan of unit 'sample'; give one or use sgd"
        )
    for name in ("proximal_mu", "weight_decay"):
        if getattr(settings, name):
            raise RecipeError(f"federate.{name}: not offered with sample privacy; set it to 0")
    return plan


LOCAL_UPDATES: dict[str, LocalUpdate] = {"sgd": sgd, "private_sgd": private_sgd}
