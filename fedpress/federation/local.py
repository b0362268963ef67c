"""Local training of a client as a generator of steps, whose gradients an algorithm may change.

Example: FedProx loops over the steps, and adds the gradient of its proximal term to each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, TypeAlias

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from fedpress.codecs import Key
from fedpress.core import parameters
from fedpress.core.canonical import JSON
from fedpress.core.examples import Arrays
from fedpress.core.inputs import Inputs, tensors_by_name
from fedpress.core.parameters import trainable
from fedpress.core.random_source import RandomSource, seed_generators_
from fedpress.core.settings import SETTINGS
from fedpress.errors import Argument, DivergedError, RecipeError, TrainingError
from fedpress.federation.vectors import Vectors
from fedpress.models.norms import freeze_batch_norm_
from fedpress.nn.batch_norm import ONE_VALUE, uses_batch_statistics
from fedpress.nn.dropout import quick_dropout
from fedpress.nn.quantized import qparam_ids
from fedpress.privacy.plan import PrivacyPlan
from fedpress.tasks import Task
from fedpress.training.device import Precision, autocast, laid_out
from fedpress.training.evaluate import evaluating, outputs
from fedpress.training.optimizers import ADAMS
from fedpress.training.settings import BETAS, DEFAULTS, Betas, fit_to_optimizer_

Prepare: TypeAlias = "Callable[[Inputs, RandomSource], Inputs]"
"""Turns raw examples [k, ...] into network input; see `LocalPlan.prepare`."""
Measures: TypeAlias = "dict[str, JSON]"
"""Numbers measured in training, such as {"loss": 0.31, "steps": 12}."""


class LocalSettings(BaseModel):
    """Settings of a client's training in one round, such as learning rate and batch size.

    If privacy protects single examples (unit "sample"), the privacy plan replaces `epochs`.
    """

    model_config = SETTINGS

    epochs: int = Field(
        default=1,
        ge=1,
        description="passes over a client's own rows in a round; ignored under unit 'sample', "
        "where the privacy plan sets the number of steps",
    )
    batch_size: int = Field(
        default=64, ge=1, description="rows in a local step; under unit 'sample' their mean number"
    )
    lr: float = Field(
        default=0.05, gt=0, description="local learning rate; default of adamw and adam: 0.001"
    )
    lr_decay: float = Field(default=1.0, gt=0, le=1, description="factor on lr after every round")
    optimizer: Literal["sgd", "adamw", "adam"] = Field(
        default="sgd", description="local optimizer; its state is reset in every round"
    )
    betas: Betas = Field(
        default=BETAS,
        description="adamw, adam: decay of the running means of the gradient and its square",
    )
    momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="momentum of sgd; the velocity starts at 0 in every round",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="decay of all weights towards 0 in every step"
    )
    precision: Precision = Field(default="float32", description="number format of forward passes")

    @model_validator(mode="after")
    def _fits_optimizer(self) -> LocalSettings:
        # Only lr has a default that depends on the optimizer. AdamW's usual weight decay is not
        # used by default: a client takes only few steps in a round.
        lr = {"lr": DEFAULTS[self.optimizer]["lr"]} if self.optimizer in DEFAULTS else {}
        fit_to_optimizer_(self, self.optimizer, lr)
        return self


def check_is_sgd(settings: LocalSettings, why: str) -> None:
    """Checks that the optimizer is SGD.

    Args:
        settings: settings of the local training.
        why: why only SGD is possible, such as "a device's runtime has no other optimizer than SGD".

    Raises:
        RecipeError: if the optimizer is not "sgd".
    """
    if settings.optimizer != "sgd":
        raise RecipeError(
            f"got '{settings.optimizer}', but {why}",
            place="optimizer",
            cure=("set ", Argument("optimizer", "sgd")),
        )


@dataclass(eq=False)
class Step:
    """One local step at the moment between computing the gradient and calling the optimizer.

    Attributes:
        params: the trained parameters, in the model's order. Do not change them.
        gradients: one gradient for each parameter, of the same shape. The optimizer uses changes
            that are made in place.
    """

    params: list[Tensor]
    gradients: list[Tensor]

    def split(self, vector: Tensor) -> list[Tensor]:
        """Splits `vector` [d] into tensors with the shapes, types and devices of the parameters."""
        parts = vector.split([p.numel() for p in self.params])
        return [part.view(p.shape).to(p) for p, part in zip(self.params, parts, strict=True)]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The result of all local steps.

    Attributes:
        measures: numbers measured in training. Example: {"loss": 0.31, "steps": 12}.
        update: the update [d]; None: the update is the change of the parameters.
    """

    measures: Measures
    update: Tensor | None = None


Steps: TypeAlias = "Generator[Step, None, Outcome]"
"""All local steps of one round; the generator returns the outcome."""
GradientSource: TypeAlias = "Callable[[nn.Module, LocalWork], Steps]"
"""Yields each step after its gradient is computed. The optimizer is called when the caller asks for
the next step, so the caller may change the gradient before."""


@dataclass(frozen=True, eq=False)
class LocalPlan:
    """How a client trains; it is the same in every round.

    Attributes:
        settings: learning rate, batch size and so on.
        prepare: function that turns raw examples [k, ...] into network input; its second argument
            is a random generator. The input of an example must not depend on other examples.
        task: what is learned; it gives the loss.
        privacy: this client's own privacy plan under unit "sample", else None.
        source: function that computes the gradients; None: `plain_steps`.
        penalties: recipe key -> strength of a penalty of the algorithm. Example: {"proximal_mu":
            0.1}. If training diverges, the error names the penalties that are too strong.
    """

    settings: LocalSettings
    prepare: Prepare
    task: Task
    privacy: PrivacyPlan | None = None
    source: GradientSource | None = None
    penalties: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LocalWork:
    """One client's training in one round.

    Attributes:
        arrays: the client's examples. An algorithm must not read them itself, because under sample
            privacy only the steps have noise. It loops over `begin`, or calls `loss`.
        key: seeds all random streams of this client in this round.
        plan: how the client trains.
        start: the server's parameters [d]; None: they are read from the model.
        extras: further vectors that the steps depend on: those from the server, and the client's
            state of the algorithm. Under sample privacy the noise is drawn from a stream whose name
            contains a fingerprint of these vectors.
    """

    arrays: Arrays
    key: Key
    plan: LocalPlan
    start: Tensor | None = None
    extras: Vectors = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """The learning rate of this round."""
        return self.plan.settings.lr * self.plan.settings.lr_decay ** (self.key.round - 1)

    def begin(self, model: nn.Module) -> LocalRun:
        """Starts local training from the parameters that `model` has now."""
        # The source decides about privacy: `private_steps` adds noise, `joint_steps` only clips.
        source = self.plan.source or plain_steps
        # Flattened (a copy) before the first step, which changes the parameters in place.
        start = parameters.flatten(model) if self.start is None else self.start
        return LocalRun(model, start, source(model, self))

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Returns the mean loss of `model` over this client's examples. The value is private.

        Raises:
            RecipeError: under sample privacy, where only noised gradients may be used.
        """
        if self.plan.privacy is not None:
            raise RecipeError(
                (
                    "it reads the loss of a client's examples, which gets no noise under unit "
                    "'sample'"
                ),
                place="algorithm",
                cure="take unit 'client', or another algorithm",
            )
        total = 0.0
        size = max(1, self.plan.settings.batch_size)
        # A stream of its own, so that computing the loss does not change the training's randomness.
        chance = self.key.client_stream("loss")
        with evaluating(model):
            for index in torch.arange(len(self.arrays)).split(size):
                loss = loss_of_batch(model, self, self.arrays.take(index), chance)
                # Weighted by batch size, because the last batch may be smaller.
                total += float(loss.double()) * len(index)
        return total / len(self.arrays)


@dataclass(eq=False)
class LocalRun:
    """The running local training of one round: loop over all steps, then read the results.

    Attributes:
        model: the model that is trained.
        start: its parameters [d] before the first step.
        steps: the generator of steps.
        outcome: the result; None until all steps are taken.

    Example:
        run = work.begin(model)
        for step in run:
            step.gradients[0].add_(0.1)  # a correction, if the algorithm has one
        update = run.update()
    """

    model: nn.Module
    start: Tensor
    steps: Steps
    outcome: Outcome | None = None

    def __iter__(self) -> Iterator[Step]:
        self.outcome = yield from self.steps

    def finish(self) -> LocalRun:
        """Takes all steps without changing a gradient, and returns this object."""
        for _ in self:
            pass
        return self

    @property
    def measures(self) -> Measures:
        """The measured numbers: "steps", and the mean "loss" unless privacy forbids it."""
        return self._done.measures

    def update(self) -> Tensor:
        """Returns the update [d] on the CPU: the change of the parameters.

        With `joint_steps` the update is minus the clipped sum of gradients.
        """
        if self._done.update is not None:
            return self._done.update
        return parameters.change(self.model, self.start)

    @property
    def _done(self) -> Outcome:
        if self.outcome is None:
            raise TrainingError(
                "not all local steps were taken",
                place="local update",
                cure="loop over all steps, or call finish()",
            )
        return self.outcome


def plain_steps(model: nn.Module, work: LocalWork) -> Steps:
    """Trains in epochs over shuffled batches, without protecting single examples.

    Args:
        model: the model to train.
        work: the client's training in this round.

    Yields:
        Each step after its gradient is computed.

    Raises:
        DivergedError: if the loss is not finite.
        TrainingError: if a batch norm in training mode gets a batch of one example.
    """
    settings = work.plan.settings
    params = trainable(model)
    shuffle = work.key.client_stream("shuffle")
    chance = work.key.client_stream("prepare")
    optimizer = optimizer_of(model, work)
    # A Python float has 64 bits: a sum of thousands of float32 losses would lose digits.
    total = 0.0
    steps = 0
    for _ in range(settings.epochs):
        for index in shuffled_batches(model, len(work.arrays), settings.batch_size, shuffle):
            with quick_dropout(model):
                loss = loss_of_batch(model, work, work.arrays.take(index), chance)
            # What `optimizer.zero_grad` does, without what it notes for torch's profiler: for a
            # tiny model that costs as much as its forward pass.
            for p in params:
                p.grad = None
            loss.backward()
            unused = [p for p in params if p.grad is None]
            yield Step([p.detach() for p in params], _gradients(params))
            _forget_(unused)
            optimizer.step()
            total += float(loss.detach())
            steps += 1
            if not isfinite(total):
                raise diverged(work, index, steps)
    return Outcome({"loss": total / steps, "steps": steps})


@contextmanager
def training_mode(model: nn.Module, *, norm: str, seed: int) -> Iterator[None]:
    """Prepares `model` for local training inside the block, and restores its buffers afterwards.

    Args:
        model: the model.
        norm: the recipe's key `norm`: with "frozen", statistics of batch norms stay as they are.
        seed: seed of dropout.
    """
    buffers = [b.clone() for b in model.buffers()]
    model.train()
    if norm == "frozen":
        freeze_batch_norm_(model)
    try:
        # Dropout draws from torch's global generator. This generator is seeded here, so that every
        # run has the same bits, and is restored afterwards for other code.
        with torch.random.fork_rng():
            seed_generators_(seed)
            yield
    finally:
        # A buffer may contain statistics of private examples. Clients may share the model, so these
        # statistics are removed before the next request comes.
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _gradients(params: list[nn.Parameter]) -> list[Tensor]:
    """Returns the gradients of `params`; zeros for parameters that the loss does not depend on.

    A correction such as FedProx's also acts on parameters without a gradient, so it needs a tensor
    to change.
    """
    found = []
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        found.append(p.grad)
    return found


def optimizer_of(model: nn.Module, work: LocalWork) -> torch.optim.Optimizer:
    """Returns a new optimizer for one round, without state from earlier rounds."""
    settings = work.plan.settings
    params = trainable(model)
    # Scales and offsets of quantized layers get no weight decay: it would shrink their range.
    no_decay = qparam_ids(model)
    groups = [
        {
            "params": [p for p in params if id(p) not in no_decay],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in params if id(p) in no_decay], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    if settings.optimizer in ADAMS:
        return ADAMS[settings.optimizer](used, lr=work.lr, betas=settings.betas)
    return torch.optim.SGD(used, work.lr, settings.momentum)


def _forget_(params: list[nn.Parameter]) -> None:
    """Sets the gradients that `_gradients` made back to None, unless an algorithm changed them.

    An optimizer skips a parameter without a gradient. To a parameter with a gradient of zeros it
    would apply weight decay and momentum, although the loss does not depend on this parameter.
    """
    for p in params:
        if p.grad is not None and not p.grad.any():
            p.grad = None


def diverged(work: LocalWork, index: Tensor, steps: int) -> DivergedError:
    """Returns the error for a loss that is not finite after `steps` steps.

    `index` holds the positions of the last batch's examples.
    """
    # Checks only the last batch, because checking all examples could take long.
    batch = tensors_by_name(work.arrays.x[index])
    broken = not all(bool(torch.isfinite(part).all()) for part in batch.values())
    data = ""
    if broken:
        data = ", or correct the examples, which have NaN or infinite values"
    settings = too_large(work.plan.settings, work.lr, penalties=work.plan.penalties)
    return DivergedError(
        f"after {steps} steps the loss is not finite in round {work.key.round}",
        place="local update",
        cure=f"lower {settings}{data}",
    )


def too_large(
    settings: LocalSettings,
    lr: float,
    *,
    penalties: Mapping[str, float] | None = None,
    place: str = "",
) -> str:
    """Returns the settings that may have made local training diverge, with their values.

    The result names the learning rate, and each penalty with lr x strength >= 2.

    Args:
        settings: settings of the local training.
        lr: learning rate of the round.
        penalties: recipe key -> strength of a penalty of the algorithm.
        place: prefix of each name in the result, such as "stage.federate.".

    >>> too_large(LocalSettings(lr=0.5, weight_decay=9.0), 0.5)
    'lr (now 0.5) or weight_decay (now 9)'
    """
    strengths = {**(penalties or {}), "weight_decay": settings.weight_decay}
    named = [("lr", lr)]
    for name, value in strengths.items():
        # One SGD step on a penalty value/2 |w|^2 multiplies w by (1 - lr value). Below -1, w grows
        # in every step.
        if lr * value >= 2:
            named.append((name, value))
    return " or ".join(f"{place}{name} (now {value:g})" for name, value in named)


def shuffled_batches(model: nn.Module, n: int, size: int, shuffle: RandomSource) -> list[Tensor]:
    """Returns the batches of one epoch over `n` examples: int64 index tensors of `size` examples.

    The last batch has the remaining examples. If only one example remains and the model has a batch
    norm in training mode, this example is added to the batch before: a batch norm cannot average
    over one value.
    """
    batches = list(shuffle.permutation(n).split(size))
    last_is_single = size > 1 and len(batches) > 1 and len(batches[-1]) == 1
    if last_is_single and uses_batch_statistics(model):
        return [*batches[:-2], torch.cat(batches[-2:])]
    return batches


def loss_of_batch(model: nn.Module, work: LocalWork, batch: Arrays, chance: RandomSource) -> Tensor:
    """Returns the mean loss of `batch`; `chance` is the generator for augmentation.

    Raises:
        TrainingError: if a batch norm in training mode gets a batch of one example.
    """
    # Only one batch at a time is moved to the model's device, to save its memory.
    at = next(model.parameters()).device
    x = work.plan.prepare(batch.x.to(at), chance)
    with autocast(model, work.plan.settings.precision):
        try:
            logits = outputs(model, laid_out(x, model))
        except ValueError as problem:
            # Only torch's error of a batch norm is translated; others are the user network's own.
            if len(x) > 1 or ONE_VALUE not in str(problem):
                raise
            if len(work.arrays) == 1:
                cure = "leave this client out"
            else:
                cure = "take batch_size = 2 or more"
            raise TrainingError(
                "a batch norm in training mode cannot average over a batch of one example",
                place="local update",
                cure=f"{cure}, or set norm = 'frozen'",
            ) from problem
    return work.plan.task.loss(logits, batch.y.to(at))
