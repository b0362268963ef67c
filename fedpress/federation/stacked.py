"""Local training of several clients in one program: their parameters are stacked in front.

A stack [K, ...] has the parameters of K clients. `torch.func.vmap` runs the network for all of them
at once: a linear layer becomes a batched matrix product, and a convolution one with groups. A small
network at a small batch leaves most of a GPU idle; many clients at once fill it.

Each client takes the steps of `plain_steps`, over the same batches. So the numbers are the same up
to rounding. Only dropout draws other masks: all clients of a stack draw from one stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from fedpress.core.inputs import Inputs
from fedpress.core.parameters import trainable
from fedpress.core.random_source import RandomSource
from fedpress.errors import DivergedError
from fedpress.federation.local import (
    GradientSource,
    LocalSettings,
    LocalWork,
    Outcome,
    Steps,
    diverged,
    plain_steps,
    shuffled_batches,
    training_mode,
)
from fedpress.nn.batch_norm import BatchNorm, uses_batch_statistics
from fedpress.nn.quantized import qparam_ids
from fedpress.tasks import Task
from fedpress.training.device import device_of, uses_bf16
from fedpress.training.evaluate import outputs

NETWORK = "network."
"""Prefix of the network's parameters in `_Loss`."""
CONVOLUTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
"""torch's functions that convolve."""
ADAM_EPS = 1e-8
"""The number that torch's Adam adds to the root of the mean square, by default."""


class CannotStackError(Exception):
    """The clients cannot be trained in one program. Its text says why."""


@dataclass(frozen=True, eq=False)
class Training:
    """One client's training in one round, which may be taken together with those of others.

    Attributes:
        model: the network. Clients that are trained together share it.
        work: the training.
        norm: the recipe's key `norm`: with "frozen", statistics of batch norms stay as they are.
        corrects_gradients: whether the algorithm changes the gradients of local steps.
    """

    model: nn.Module
    work: LocalWork
    norm: str
    corrects_gradients: bool

    def check(self) -> None:
        """Checks that its steps are those that `train_together` takes.

        Raises:
            CannotStackError: if they are not.
        """
        plan = self.work.plan
        if plan.privacy is not None:
            raise CannotStackError("unit 'sample' clips and noises the gradient of each example")
        if plan.source not in (None, plain_steps):
            raise CannotStackError("another function than plain_steps computes the gradients")
        if self.corrects_gradients:
            raise CannotStackError("the algorithm corrects the gradients of each client by itself")


def train_together(trainings: Sequence[Training]) -> list[Outcome | DivergedError]:
    """Trains clients in one program.

    Clients whose next batches have equal sizes take a step together; those with another size, such
    as a smaller last batch, take theirs after them. Clients with more batches go on alone.

    Args:
        trainings: one training of each client. All have the same round, model and plan, and passed
            `check`. Parameters and buffers of the model are not changed.

    Returns:
        In their order, the outcomes, whose updates are float32 [d] on the CPU; an error for a
        client whose loss was not finite.

    Raises:
        CannotStackError: if torch cannot run the network for several clients at once.
        torch.OutOfMemoryError: if they do not fit into the device's memory.
    """
    first = trainings[0]
    # Long trainings first: the clients that still train then stand together in front, and a slice
    # of the stack needs no copy.
    order = sorted(range(len(trainings)), key=lambda at: -len(trainings[at].work.arrays))
    works = [trainings[at].work for at in order]
    seed = first.work.key.client_seed("dropout")
    with training_mode(first.model, norm=first.norm, seed=seed):
        stack = _Stack.of(first.model, works)
        while groups := stack.groups():
            for rows in groups:
                stack.try_step_(rows)
    found = dict(zip(order, stack.outcomes(), strict=True))
    return [found[at] for at in range(len(works))]


def computed(outcome: Outcome | DivergedError) -> GradientSource:
    """Returns a source without steps, whose outcome was computed before; an error is raised."""

    def steps(model: nn.Module, work: LocalWork) -> Steps:
        if isinstance(outcome, DivergedError):
            raise outcome
        yield from ()
        return outcome

    return steps


class _Loss(nn.Module):
    """The loss of one client's batch, as a module: `functional_call` replaces its parameters."""

    def __init__(self, network: nn.Module, task: Task, *, bf16: bool) -> None:
        super().__init__()
        self.network = network
        self.task = task
        self.bf16 = bf16

    def forward(self, x: Inputs, y: Tensor) -> Tensor:
        """Returns the mean loss over inputs x [b, ...] and targets y [b, ...]."""
        with _in_bf16(y.device) if self.bf16 else nullcontext():
            logits = outputs(self.network, x)
        return self.task.loss(logits, y)


class _ConvolveInBf16(TorchFunctionMode):
    """Converts the arguments of convolutions, which torch's autocast overlooks inside `vmap`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS:
            args, kwargs = tree_map(_to_bf16, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _to_bf16(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) else value


@contextmanager
def _in_bf16(device: torch.device) -> Iterator[None]:
    """Computes products inside the block in bfloat16, as autocast does for one client."""
    with torch.autocast(device.type, torch.bfloat16), _ConvolveInBf16():
        yield


@dataclass(eq=False)
class _Member:
    """One client in a stack.

    Attributes:
        work: its training.
        batches: all its batches: positions of examples, int64 [b].
        chance: the random stream of its augmentation.
        taken: number of steps that it has taken.
        losses: position of each of its losses in `_Stack.losses`.
    """

    work: LocalWork
    batches: list[Tensor]
    chance: RandomSource
    taken: int = 0
    losses: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, work: LocalWork) -> _Member:
        """Returns the client before its first step, with the batches that `plain_steps` draws."""
        settings = work.plan.settings
        shuffle = work.key.client_stream("shuffle")
        batches = []
        for _ in range(settings.epochs):
            batches += shuffled_batches(model, len(work.arrays), settings.batch_size, shuffle)
        return cls(work, batches, work.key.client_stream("prepare"))


@dataclass(eq=False)
class _Stack:
    """The parameters of several clients, and the state of their optimizers.

    Attributes:
        loss: the loss of one client.
        members: the clients.
        examples: the examples of all clients on the model's device, one client after another.
        params: name -> trained parameters [K, ...].
        start: the parameters before the first step, [K, d].
        state: state of the optimizer: name of a parameter -> its tensors [K, ...].
        buffers: name -> buffers [K, ...] of batch norms that use batch statistics.
        fixed: name -> all other buffers, which the clients share.
        decays: names of the parameters with weight decay.
        losses: mean losses of each step, [number of its clients].
    """

    loss: _Loss
    members: list[_Member]
    examples: _Examples
    params: dict[str, Tensor]
    start: Tensor
    state: dict[str, tuple[Tensor, ...]]
    buffers: dict[str, Tensor]
    fixed: dict[str, Tensor]
    decays: frozenset[str]
    losses: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, works: Sequence[LocalWork]) -> _Stack:
        """Returns the stack before the first step."""
        plan = works[0].plan
        loss = _Loss(model, plan.task, bf16=uses_bf16(model, plan.settings.precision))
        start = _starts(model, works)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        params = {}
        at = 0
        for name, p in named:
            part = start[:, at : at + p.numel()]
            params[NETWORK + name] = part.reshape(len(works), *p.shape).to(p.dtype, copy=True)
            at += p.numel()
        # SGD keeps a velocity, Adam means of gradients and of their squares.
        kept = 2
        if plan.settings.optimizer == "sgd":
            kept = 1 if plan.settings.momentum else 0
        state = {}
        for name, stacked in params.items():
            state[name] = tuple(torch.zeros_like(stacked) for _ in range(kept))
        buffers, fixed = _buffers(model, len(works))
        no_decay = qparam_ids(model)
        return cls(
            loss,
            [_Member.of(model, work) for work in works],
            _Examples.of(works, device_of(model)),
            params,
            start,
            state,
            buffers,
            fixed,
            frozenset(NETWORK + name for name, p in named if id(p) not in no_decay),
        )

    @property
    def settings(self) -> LocalSettings:
        """The settings of all trainings."""
        return self.members[0].work.plan.settings

    def groups(self) -> list[list[int]]:
        """Returns the clients that take a step next, in groups of equal batch size."""
        by_size: dict[int, list[int]] = {}
        for row, member in enumerate(self.members):
            if member.taken < len(member.batches):
                by_size.setdefault(len(member.batches[member.taken]), []).append(row)
        return [by_size[size] for size in sorted(by_size, reverse=True)]

    def try_step_(self, rows: list[int]) -> None:
        """Does the same as `step_`; an error of torch becomes a `CannotStackError`."""
        try:
            self.step_(rows)
        except torch.OutOfMemoryError:
            raise
        # Of any kind, because a user's network is run in a way that it was not written for.
        except (Exception, SystemExit) as problem:
            lines = str(problem).strip().splitlines() or [type(problem).__name__]
            raise CannotStackError(f"torch says: {lines[0]}") from problem

    def step_(self, rows: list[int]) -> None:
        """Takes one step of the clients in `rows`, whose batches have equal sizes."""
        x, y = self.examples.batch([(row, self.members[row]) for row in rows])
        at = _selection(rows, y.device)
        params = {name: p[at].detach().requires_grad_() for name, p in self.params.items()}
        buffers = {name: b[at] for name, b in self.buffers.items()}

        def loss(own: dict[str, Tensor], held: dict[str, Tensor], x: Inputs, y: Tensor) -> Tensor:
            found: Tensor = functional_call(self.loss, (own, held, self.fixed), (x, y))
            return found

        # Each client has its own dropout masks.
        losses = vmap(loss, randomness="different")(params, buffers, x, y)
        # The gradient of the sum: each loss depends on its client's parameters alone.
        gradients = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        with torch.no_grad():
            unbias = [] if self.settings.optimizer == "sgd" else self._unbias(rows, y.device)
            for (name, p), gradient in zip(params.items(), gradients, strict=True):
                # As torch's optimizers, which leave a parameter without gradient as it is.
                if gradient is not None:
                    self._descend_(name, p, gradient, at, unbias)
            # A slice is the stack's own memory; rows at other places are copies.
            if isinstance(at, Tensor):
                for name, b in buffers.items():
                    self.buffers[name][at] = b
        self._note_(rows, losses.detach())

    def _descend_(
        self, name: str, p: Tensor, gradient: Tensor, at: slice | Tensor, unbias: list[Tensor]
    ) -> None:
        """Moves some rows of a parameter against the gradient.

        Args:
            name: name of the parameter.
            p: its rows; a slice of the stack, or a copy.
            gradient: the gradient of these rows.
            at: which rows they are.
            unbias: see `_unbias`.
        """
        settings = self.settings
        lr = self.members[0].work.lr
        state = [tensor[at] for tensor in self.state[name]]
        decay = settings.weight_decay if name in self.decays else 0.0
        if decay and settings.optimizer == "adamw":
            p.mul_(1 - lr * decay)
        elif decay:
            gradient = gradient.add(p, alpha=decay)
        if settings.optimizer != "sgd":
            gradient = _adam_direction_(state, gradient, settings.betas, unbias)
        elif settings.momentum:
            # From a velocity of 0 this is the gradient itself, as in torch's first step.
            gradient = state[0].mul_(settings.momentum).add_(gradient)
        p.add_(gradient, alpha=-lr)
        if isinstance(at, Tensor):
            self.params[name][at] = p
            for whole, part in zip(self.state[name], state, strict=True):
                whole[at] = part

    def _unbias(self, rows: list[int], device: torch.device) -> list[Tensor]:
        """Returns the divisors [k] of Adam's two means, which start at 0 and are thus too small."""
        taken = torch.tensor([self.members[row].taken + 1.0 for row in rows], dtype=torch.float64)
        first, second = [1 - torch.pow(beta, taken) for beta in self.settings.betas]
        both = torch.stack([first, second.sqrt()]).float()
        return list(both.to(device, non_blocking=True))

    def _note_(self, rows: list[int], losses: Tensor) -> None:
        """Counts a step, and keeps its losses without waiting for the device."""
        for place, row in enumerate(rows):
            member = self.members[row]
            member.losses.append((len(self.losses), place))
            member.taken += 1
        self.losses.append(losses)

    def outcomes(self) -> Iterator[Outcome | DivergedError]:
        """Yields the result of each client, after all steps."""
        read = [losses.tolist() for losses in _on_cpu(self.losses)]
        trained = torch.cat([p.reshape(len(p), -1).float() for p in self.params.values()], dim=1)
        updates = (trained - self.start).cpu()
        for row, member in enumerate(self.members):
            # In the order of `plain_steps`, which stops at the first sum that is not finite.
            total = torch.zeros((), dtype=torch.float64)
            steps = 0
            for step, place in member.losses:
                total += read[step][place]
                steps += 1
                if not torch.isfinite(total):
                    break
            if torch.isfinite(total):
                # A copy, because a view would keep the updates of all clients alive.
                measures = {"loss": float(total) / steps, "steps": steps}
                yield Outcome(dict(measures), updates[row].clone())
            else:
                yield diverged(member.work, member.batches[steps - 1], steps)


def _adam_direction_(
    state: list[Tensor], gradient: Tensor, betas: tuple[float, float], unbias: list[Tensor]
) -> Tensor:
    """Updates the running means in `state`, and returns Adam's direction (arXiv:1412.6980).

    Args:
        state: means [k, ...] of the gradient and of its square.
        gradient: the gradient [k, ...].
        betas: decays of both means.
        unbias: divisors [k] of the means, and of the root of the mean square.
    """
    mean, square = state
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    shape = (-1, *[1] * (gradient.dim() - 1))
    first, second = [divisor.to(gradient.dtype).view(shape) for divisor in unbias]
    return mean / first / (square.sqrt() / second + ADAM_EPS)


@dataclass(frozen=True, eq=False)
class _Examples:
    """The examples of all clients of a stack, on the model's device.

    They are moved once, because every small copy to a GPU costs as much as a large one.

    Attributes:
        x: raw examples [n, ...].
        y: targets [n, ...].
        starts: position of each client's first example.
    """

    x: Inputs
    y: Tensor
    starts: list[int]

    @classmethod
    def of(cls, works: Sequence[LocalWork], device: torch.device) -> _Examples:
        """Joins the examples of the clients."""
        x = [work.arrays.x for work in works]
        y = [work.arrays.y for work in works]
        starts = [0]
        for targets in y[:-1]:
            starts.append(starts[-1] + len(targets))
        joined: Inputs = tree_map(lambda *parts: torch.cat(parts), x[0], *x[1:])
        return cls(joined.to(device), torch.cat(y).to(device), starts)

    def batch(self, members: list[tuple[int, _Member]]) -> tuple[Inputs, Tensor]:
        """Returns inputs and targets [k, b, ...] of the next step of `members`, given with rows."""
        positions = []
        for row, member in members:
            positions.append(member.batches[member.taken] + self.starts[row])
        index = torch.stack(positions)
        # One copy to the device, which need not wait for what the device computes now.
        index = index.to(self.y.device, non_blocking=True)
        x = self._prepared(self.x[index.flatten()], members)
        return _unflatten(x, len(members)), self.y[index]

    def _prepared(self, x: Inputs, members: list[tuple[int, _Member]]) -> Inputs:
        """Returns the network's input for raw examples x [k * b, ...] of k clients."""
        prepare = members[0][1].work.plan.prepare
        try:
            # For all clients at once, as the input of an example depends on this example alone.
            return prepare(x, _NoChance())
        except _Drawn:
            parts = []
            rows = len(x) // len(members)
            for place, (_, member) in enumerate(members):
                part = x[place * rows : (place + 1) * rows]
                # Each client's augmentation follows its own random stream.
                parts.append(prepare(part, member.chance))
            joined: Inputs = tree_map(lambda *found: torch.cat(found), parts[0], *parts[1:])
            return joined


class _Drawn(Exception):
    """Somebody has drawn from `_NoChance`."""


class _NoChance:
    """A random source that raises `_Drawn` when it is used."""

    exact = False

    def _draw(self, *arguments: Any, **named: Any) -> Any:
        raise _Drawn

    normal = uniform = integers = permutation = subset = words = _draw


def _unflatten(x: Inputs, clients: int) -> Inputs:
    """Returns x [k * b, ...] as [k, b, ...]."""
    found: Inputs = tree_map(lambda t: t.unflatten(0, (clients, -1)), x)
    return found


def _on_cpu(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns vectors on the CPU, moved in one copy, because each copy waits for the device."""
    sizes = [len(tensor) for tensor in tensors]
    return list(torch.cat(list(tensors)).cpu().double().split(sizes))


def _starts(model: nn.Module, works: Sequence[LocalWork]) -> Tensor:
    """Returns the parameters from which the clients start, float32 [K, d] on the model's device."""
    device = device_of(model)
    sent: dict[int, Tensor] = {}
    rows = []
    for work in works:
        if work.start is None:
            rows.append(torch.cat([p.detach().reshape(-1).float() for p in trainable(model)]))
            continue
        # Mostly the same vector for all clients, which is then moved once.
        if id(work.start) not in sent:
            sent[id(work.start)] = work.start.to(device, torch.float32)
        rows.append(sent[id(work.start)])
    return torch.stack(rows)


def _buffers(model: nn.Module, clients: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the buffers that the training of each client writes, [K, ...], and all others."""
    own = {}
    shared = {}
    for name, module in model.named_modules():
        # Only these have a running mean that a step changes; frozen ones are shared.
        writes = isinstance(module, BatchNorm) and uses_batch_statistics(module)
        for key, buffer in module.named_buffers(recurse=False):
            path = NETWORK + (f"{name}.{key}" if name else key)
            if writes:
                own[path] = torch.stack([buffer] * clients)
            else:
                shared[path] = buffer
    return own, shared


def _selection(rows: list[int], device: torch.device) -> slice | Tensor:
    """Returns `rows` as a slice if they stand together, because then nothing is copied."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)
