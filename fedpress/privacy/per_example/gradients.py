"""The query of DP-SGD: the sum of clipped per-sample gradients, of sensitivity `clip_norm`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, join, map_inputs, tensors_by_name
from fedpress.core.parameters import trainable
from fedpress.errors import RecipeError, suggestion
from fedpress.nn.batch_norm import BatchNorm
from fedpress.nn.resize import copied
from fedpress.privacy.per_example import ghost
from fedpress.privacy.per_example.guard import Guard
from fedpress.privacy.per_example.persample import (
    WROTE_PREFIX,
    LossFn,
    Measured,
    Query,
    Sample,
    add_loop_,
    add_vmap_,
)

Method = Literal["ghost", "vmap", "loop"]

Verify = Literal["nothing", "losses", "gradients"]
"""What of every chunk is compared with the plain loop."""

METHODS: dict[str, Callable[[list[Tensor], Query], Measured]] = {
    "ghost": ghost.add_ghost_,
    "vmap": add_vmap_,
    "loop": add_loop_,
}


@dataclass(frozen=True)
class RawStats:
    """What happened to the samples of one batch.

    NOT private: no noise was added, so it must not leave the client.

    Attributes:
        examples: size of the batch that was drawn.
        loss: mean loss over the samples with a finite one; nan if there are none.
        share_clipped: share of the samples whose gradient was longer than the clip norm.
        refused: samples with a NaN or infinite gradient; they contributed zero.
        failed: samples on which the network raised, or wrote into its own buffers or parameters;
            they contributed zero, too.
        problem: what went wrong on the first of the failed samples; empty if there are none.
        agreed: whether the method that was asked for gave the same as the plain loop.
    """

    examples: int
    loss: float
    share_clipped: float
    refused: int
    failed: int = 0
    problem: str = ""
    agreed: bool = True


def clipped_gradient_sum(
    model: nn.Module,
    loss_fn: LossFn,
    x: Inputs,
    y: Tensor,
    *,
    clip_norm: float,
    method: Method = "loop",
    chunk: int = 128,
    verify: Verify = "nothing",
    tolerate_writes: bool = False,
) -> tuple[Tensor, RawStats]:
    """Returns the sum over samples of gradient * min(1, clip_norm / norm).

    Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1. Adding or removing one sample changes the sum
    by at most `clip_norm` in L2, also if its gradient is NaN or infinite or its square overflows,
    or if the network raises on it. With "ghost" and "vmap" this holds up to the rounding of kernels
    whose order of summation depends on the batch.

    Args:
        model: its trainable parameters, in the order of `core.parameters`, give the d values.
        loss_fn: outputs and labels of one example [1, ...] -> its loss.
        x: prepared inputs [n, ...], one tensor or several by name; n may be 0.
        y: labels [n].
        clip_norm: the L2 bound of one sample.
        method: row of `METHODS`; see `choose_method`.
        chunk: samples that are in memory together.
        verify: what of every chunk is compared with the loop: "losses" of 4 samples, or "gradients"
            (their norms) of 8. After a mismatch, or if the method raises, the loop does the chunk.
        tolerate_writes: what happens if a forward pass writes private data into a buffer or
            parameter. True: the write is undone, and the sample contributes zero. False: the batch
            is refused, which must not be seen outside, since one sample can cause it.

    Returns:
        The sum, float32 [d], and statistics that are not private.

    Raises:
        RecipeError: if a module mixes the samples of a batch, if the method is unknown, or, unless
            `tolerate_writes`, if a forward pass wrote into a buffer or parameter.
    """
    check_separable(model)
    if method not in METHODS:
        raise RecipeError(
            f"got {method!r}, expected one of {list(METHODS)}",
            place="method",
            cure=suggestion(method, [*METHODS], "leave it out"),
        )
    query = Query(model, loss_fn, x, y, clip_norm)
    running = _RunningSum(model)
    # Chunks bound the memory.
    for start in range(0, len(x), chunk):
        part = query.take(slice(start, start + chunk))
        if method == "loop" or not running.try_add_(method, part, verify):
            running.add_one_by_one_(part)
    if running.wrote and not tolerate_writes:
        place, _, text = running.wrote.removeprefix(WROTE_PREFIX).partition(": ")
        problem, _, cure = text.partition("; ")
        raise RecipeError(problem, place=place, cure=cure)
    return running.total, _stats(running.measured, clip_norm, running.agreed)


class _RunningSum:
    """The sum of clipped gradients so far.

    Attributes:
        total: the sum, float32 [d].
        views: `total` as one view for each trainable parameter.
        measured: what happened to each sample so far.
        agreed: whether no chunk had to be done again by the loop.
        wrote: what a forward pass first changed in the model, and the cure; empty if nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.guard = Guard(model)
        params = trainable(model)
        sizes = [p.numel() for p in params]
        self.total = torch.zeros(sum(sizes), device=params[0].device)
        self.views: list[Tensor] = []
        for part, p in zip(self.total.split(sizes), params, strict=True):
            self.views.append(part.view(p.shape))
        self.measured: Measured = []
        self.agreed = True
        self.wrote = ""

    def try_add_(self, method: Method, query: Query, verify: Verify) -> bool:
        """Adds the samples of a chunk by `method`.

        Returns False, with nothing added, if the method raised, differs from the loop, or if the
        model wrote into itself: in a batch it is not known on which sample.
        """
        # A method that raises may have added some samples before.
        before = self.total.clone()
        found: Measured | None
        if verify == "nothing":
            found = METHODS[method](self.views, query)
        else:
            found = _verified(self.views, query, method, verify)
        changed = self.guard.put_back_()
        if not changed and found is not None:
            self.measured += found
            return True
        self.total.copy_(before)
        self.agreed = False
        self.wrote = self.wrote or changed
        return False

    def add_one_by_one_(self, query: Query) -> None:
        """Adds the samples of a chunk one by one, where no sample can change another's gradient."""
        found = add_loop_(self.views, query, self.guard)
        self.measured += found
        for sample in found:
            if not self.wrote and sample.problem.startswith(WROTE_PREFIX):
                self.wrote = sample.problem


def _verified(views: list[Tensor], query: Query, method: Method, verify: Verify) -> Measured | None:
    """Adds a chunk by `method`; None if it raised, or if some samples differ from the loop."""
    try:
        measured = METHODS[method](views, query)
        rows = _rows_to_verify(query.x, 8 if verify == "gradients" else 4)
        with _without_dropout(query.model) as drew:
            # With dropout the two runs draw different masks. Then the losses without dropout are
            # compared, which takes a third of the time of gradients.
            together = _losses(query, rows) if drew else [measured[row] for row in rows]
            if verify == "gradients" and not drew:
                alone = add_loop_([torch.zeros_like(view) for view in views], query.take(rows))
            else:
                # Norms are left out of the comparison.
                together = [sample._replace(norm=0.0) for sample in together]
                alone = [_losses(query.one(row), [0])[0] for row in rows]
    except Exception:
        # torch.func, or a rule of `ghost`, cannot do what this network did on these values.
        return None
    # In 16 bits the same network differs by more between batch sizes.
    tolerance = 0.1 if torch.is_autocast_enabled(query.x.device.type) else 2e-3
    agree = all(_agree(a, b, tolerance) for a, b in zip(together, alone, strict=True))
    return measured if agree else None


@torch.no_grad()
def _losses(query: Query, rows: list[int]) -> Measured:
    """Returns the loss of each of `rows` when the batch runs as a whole; norms are 0."""
    outputs = call(query.model, query.x)
    found = []
    # In float32, also under autocast, since losses are compared.
    for row in rows:
        at = slice(row, row + 1)
        found.append(Sample(float(query.loss_fn(outputs[at].float(), query.y[at])), 0.0))
    return found


def _rows_to_verify(x: Inputs, count: int) -> list[int]:
    """Returns up to `count` rows of `x` [n, ...] to compare.

    The largest input, its neighbours, the smallest, then evenly spread ones. A network that mixes
    examples on rare inputs only most likely does so on extreme ones, or changes the examples beside
    them.
    """
    n = len(x)
    if n <= count:
        return list(range(n))
    sizes = [part.reshape(n, -1).double().norm(dim=1) for part in tensors_by_name(x).values()]
    size = sizes[0] if len(sizes) == 1 else torch.stack(sizes).norm(dim=0)
    # An input with NaN is as suspicious as an infinite one.
    size = size.nan_to_num(math.inf)
    spread = torch.linspace(0, n - 1, count).long().tolist()
    largest = int(size.argmax())
    extreme = [largest, (largest + 1) % n, (largest - 1) % n, int(size.argmin())]
    return list(dict.fromkeys([*extreme, *spread]))[:count]


def _agree(a: Sample, b: Sample, tolerance: float) -> bool:
    """Says whether loss and norm of a sample are the same up to `tolerance`."""
    # A sample that only one of the two could do differs.
    if a.problem or b.problem:
        return False
    return _close(a.loss, b.loss, tolerance) and _close(a.norm, b.norm, tolerance)


def _close(one: float, other: float, tolerance: float) -> bool:
    if not math.isfinite(one) and not math.isfinite(other):
        return True
    # The constant keeps values near 0 from failing by rounding alone.
    return abs(one - other) <= tolerance * (1e-3 + abs(other))


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switches dropout layers off; yields whether any of them was on."""
    layers = []
    for module in model.modules():
        if not isinstance(module, nn.modules.dropout._DropoutNd):
            continue
        if module.training and module.p > 0:
            layers.append(module)
    for layer in layers:
        layer.training = False
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.training = True


def choose_method(model: nn.Module, loss_fn: LossFn, x: Inputs, y: Tensor) -> Method:
    """Returns the fastest method that agrees with the plain loop on a copy of `model`.

    Tried on two inputs: random numbers of the shape and type of `x`. Where inputs are whole numbers
    (tokens, say), or the network has embeddings, random numbers may be no valid input, and where
    the network cannot run on them: there two rows of `x` are taken. A network that mixes samples
    fails the comparison for every batched method, so it gets the loop, where samples cannot mix.
    Mixing on rare inputs only is found by `verify` of `clipped_gradient_sum`.

    Args:
        model: the network.
        loss_fn: outputs and labels of one example -> its loss.
        x: prepared inputs [n, ...].
        y: labels [n].
    """
    candidates: list[Method] = ["ghost"] if ghost.supports(model) else []
    # On a CPU vmap is worth trying for small networks without convolutions only.
    small = sum(p.numel() for p in trainable(model)) < 1_000_000 and not _convolves(model)
    if small or x.device.type != "cpu":
        candidates.append("vmap")
    if not candidates:
        return "loop"
    # Made-up inputs are no secret, and the same network must get the same method again.
    noise = torch.Generator().manual_seed(0)
    try:
        twin = _trial_copy(model, noise)
    except Exception:
        # A method that cannot be tried is not used.
        return "loop"

    # Zeros are valid targets of every task.
    labels = torch.zeros((2, *y.shape[1:]), dtype=y.dtype, device=y.device)
    tries = [join([x[:1], x[-1:]])]
    if not _takes_whole_numbers(model, x):
        made_up = map_inputs(x, lambda t: torch.randn((2, *t.shape[1:]), generator=noise).to(t))
        tries.insert(0, made_up)
    # Random numbers first: real rows may be equal or zero, and then hide a wrong gradient.
    for inputs in tries:
        expected, raw = clipped_gradient_sum(
            twin, loss_fn, inputs, labels, clip_norm=1.0, tolerate_writes=True
        )
        if not raw.failed:
            break
    for method in candidates:
        try:
            got, _ = clipped_gradient_sum(
                twin, loss_fn, inputs, labels, clip_norm=1.0, method=method
            )
        except Exception:
            # torch.func, or a rule of `ghost`, cannot do this network.
            continue
        if float((got - expected).norm()) <= 1e-3 * float(expected.norm()):
            return method
    return "loop"


def _trial_copy(model: nn.Module, noise: torch.Generator) -> nn.Module:
    """Returns a copy to try methods on."""
    # Modules keep their mode: a network may mix samples in training mode only.
    twin = copied(model)
    for module in twin.modules():
        # Except dropout: two methods would draw different masks.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.no_grad():
        # A layer that is all zeros would hide that a gradient is wrong.
        for p in trainable(twin):
            p.add_(0.05 * torch.randn(p.shape, generator=noise).to(p))
    return twin


def _takes_whole_numbers(model: nn.Module, x: Inputs) -> bool:
    """Says whether inputs may be indices such as tokens, of which a random number is none."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return True
    return any(_is_whole(part) for part in tensors_by_name(x).values())


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() or bool((values == values.round()).all())


def check_separable(model: nn.Module) -> None:
    """Raises RecipeError if a module lets one sample change the gradient of another."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, BatchNorm)
        # Without running statistics a batch norm takes those of the batch in evaluation, too.
        if batch_norm and (module.training or module.running_mean is None):
            raise RecipeError(
                (
                    "batch normalisation in training mode mixes the samples of a batch, so no "
                    "sample has a gradient of its own"
                ),
                place=f"model.{name}",
                cure="use norm = 'frozen' or 'group'",
            )
        if (
            isinstance(module, nn.modules.instancenorm._InstanceNorm)
            and module.track_running_stats
            and module.training
        ):
            raise RecipeError(
                "running statistics keep private data without noise",
                place=f"model.{name}",
                cure="use norm = 'group'",
            )


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def _stats(measured: Measured, clip_norm: float, agreed: bool) -> RawStats:
    losses = []
    problems = []
    clipped = 0
    not_finite = 0
    for sample in measured:
        if math.isfinite(sample.loss):
            losses.append(sample.loss)
        if sample.problem:
            problems.append(sample.problem)
        clipped += sample.norm > clip_norm
        not_finite += not math.isfinite(sample.norm)
    return RawStats(
        examples=len(measured),
        loss=sum(losses) / len(losses) if losses else math.nan,
        share_clipped=clipped / max(len(measured), 1),
        # A sample on which the network raised has no norm either.
        refused=not_finite - len(problems),
        failed=len(problems),
        problem=problems[0] if problems else "",
        agreed=agreed,
    )
