"""The sum of per-sample gradients, each clipped: the query of DP-SGD, whose L2 sensitivity is the clip norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, join, map_inputs, parts_of
from fedpress.core.parameters import trainable
from fedpress.errors import RecipeError, suggestion
from fedpress.nn.batch_norm import BatchNorm
from fedpress.nn.resize import copied
from fedpress.privacy.per_example import ghost
from fedpress.privacy.per_example.guard import Guard
from fedpress.privacy.per_example.persample import (
    WRITTEN,
    LossFn,
    Measured,
    Query,
    Sample,
    add_loop_,
    add_vmap_,
)

Method = Literal["ghost", "vmap", "loop"]

Verify = Literal["nothing", "losses", "gradients"]

METHODS: dict[str, Callable[[list[Tensor], Query], Measured]] = {
    "ghost": ghost.add_ghost_,
    "vmap": add_vmap_,
    "loop": add_loop_,
}


@dataclass(frozen=True)
class RawStats:
    """What happened to the samples of one batch. NOT private: no noise was added, so it must not leave the client.

    Attributes:
        examples: size of the batch that was drawn.
        loss: mean loss over the samples with a finite one; nan if there are none.
        share_clipped: share of the samples whose gradient was longer than the clip norm.
        refused: samples with a NaN or infinite gradient; they contributed zero.
        failed: samples on which the network raised, or wrote into itself; they contributed zero, too.
        problem: what went wrong on the first of them, else empty.
        agreed: False if the method that was asked for gave way to the loop.
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
    contain: bool = False,
) -> tuple[Tensor, RawStats]:
    """Returns the sum over samples of gradient * min(1, clip_norm / norm), and statistics that are not private.

    Abadi et al. 2016, Algorithm 1. Adding or removing one sample changes the sum by at most `clip_norm` in L2, also
    when that sample's gradient is NaN or infinite, when the network raises on it (it contributes zero), or when the
    gradient overflows float32 when squared. For "ghost" and "vmap" this holds up to the rounding of kernels whose
    order of summation depends on the batch.

    Args:
        model: its trainable parameters, in the order of `tree.Layout`, give the d values.
        loss_fn: outputs and labels of one example [1, ...] to its loss.
        x: prepared inputs [n, ...], one tensor or several by name; n may be 0.
        y: labels [n].
        clip_norm: the L2 bound of one sample.
        method: row of `METHODS`; see `choose_method`.
        chunk: samples that are in memory together.
        verify: what of every chunk is compared with the loop: "losses" of 4 samples, or "gradients" (their norms) of
            8. Where they differ, or the method raises, the loop does the chunk: a network may mix examples, or take
            another branch, on rare inputs only. With "nothing" the method may raise.
        contain: whether a sample on which the forward pass changes a buffer or parameter, which would keep private
            data without noise, contributes zero and is one that failed. Otherwise the whole batch is refused, which
            must not happen where somebody sees the refusal: one sample would decide on it. The change is undone in
            both cases.

    Raises:
        RecipeError: if a module mixes the samples of a batch (batch normalisation in training mode), or for an
            unknown method; or, unless `contain`, if a forward pass changed a buffer or parameter.
    """
    check_separable(model)
    if method not in METHODS:
        raise RecipeError(
            f"got {method!r}, expected one of {list(METHODS)}",
            place="method",
            cure=suggestion(method, [*METHODS], "leave it out"),
        )
    query, running = Query(model, loss_fn, x, y, clip_norm), _Sum(model)
    for start in range(0, len(x), chunk):
        part = query.take(slice(start, start + chunk))
        if method == "loop" or not running.add_by_(method, part, verify):
            running.add_alone_(part)
    if running.written and not contain:
        raise RecipeError(
            running.written.removeprefix(WRITTEN),
            place="model",
            cure="keep what its forward pass writes out of it",
        )
    return running.total, _stats(running.measured, clip_norm, running.agreed)


class _Sum:
    """The sum of clipped gradients so far.

    Attributes:
        total: the sum [d].
        measured: what was seen of each sample.
        agreed: whether no chunk that was tried by another method gave way to the loop.
        written: what a forward pass has changed in the model first, and the cure; empty if nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.guard = Guard(model)
        params = trainable(model)
        self.total = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        parts = self.total.split([p.numel() for p in params])
        self.views = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
        self.measured: Measured = []
        self.agreed, self.written = True, ""

    def add_by_(self, method: Method, query: Query, verify: Verify) -> bool:
        """Adds the samples of a chunk by `method`; returns False, with nothing added, if it cannot be trusted here."""
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
        self.written = self.written or changed
        return False

    def add_alone_(self, query: Query) -> None:
        """Adds the samples of a chunk one by one, where none can touch another."""
        found = add_loop_(self.views, query, self.guard)
        self.measured += found
        problems = [one.problem for one in found if one.problem.startswith(WRITTEN)]
        self.written = self.written or next(iter(problems), "")


def _verified(views: list[Tensor], query: Query, method: Method, verify: Verify) -> Measured | None:
    """Adds a chunk by `method`; returns None if it raised, or if some samples differ from what they are alone."""
    try:
        measured = METHODS[method](views, query)
        rows = _rows_to_verify(query.x, 8 if verify == "gradients" else 4)
        with _without_dropout(query.model) as drew:
            # What was measured with dropout cannot be compared: losses without it can, at a third of the price.
            together = _losses(query, rows) if drew else [measured[row] for row in rows]
            if verify == "gradients" and not drew:
                alone = add_loop_([torch.zeros_like(v) for v in views], query.take(rows))
            else:
                together = [one._replace(norm=0.0) for one in together]
                alone = [_losses(query.one(row), [0])[0] for row in rows]
    except Exception:  # torch.func or the rules do not know what this network did on these values
        return None
    room = 0.1 if torch.is_autocast_enabled(query.x.device.type) else 2e-3
    alike = all(_alike(a, b, room) for a, b in zip(together, alone, strict=True))
    return measured if alike else None


@torch.no_grad()
def _losses(query: Query, rows: list[int]) -> Measured:
    """Returns the loss of each of `rows` when the batch runs as a whole, with no norm."""
    outputs, found = call(query.model, query.x), []
    for row in rows:
        at = slice(row, row + 1)
        found.append(Sample(float(query.loss_fn(outputs[at].float(), query.y[at])), 0.0))
    return found


def _rows_to_verify(x: Inputs, count: int) -> list[int]:
    """Returns up to `count` places in `x` [n, ...]: the largest input, its neighbours, the smallest, then spread ones.

    What a network does on rare inputs only it most likely does on extreme ones, or to those that lie beside them.
    """
    n = len(x)
    if n <= count:
        return list(range(n))
    sizes = [part.reshape(n, -1).double().norm(dim=1) for part in parts_of(x).values()]
    size = (sizes[0] if len(sizes) == 1 else torch.stack(sizes).norm(dim=0)).nan_to_num(math.inf)
    spread = torch.linspace(0, n - 1, count).long().tolist()
    largest = int(size.argmax())
    extreme = [largest, (largest + 1) % n, (largest - 1) % n, int(size.argmin())]
    return list(dict.fromkeys([*extreme, *spread]))[:count]


def _alike(a: Sample, b: Sample, room: float) -> bool:
    """Whether loss and norm of a sample agree; a sample that only one of the two could do does not."""
    if a.problem or b.problem:
        return False
    pairs = ((a.loss, b.loss), (a.norm, b.norm))
    return all(
        abs(one - other) <= room * (1e-3 + abs(other))
        or not (math.isfinite(one) or math.isfinite(other))
        for one, other in pairs
    )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switches dropout layers off; yields whether there were any that draw."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
    ]
    for layer in layers:
        layer.training = False
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.training = True


def choose_method(model: nn.Module, loss_fn: LossFn, x: Inputs, y: Tensor) -> Method:
    """Returns the fastest method that agrees with the plain loop on a copy of `model` and two inputs.

    The inputs are random numbers of the shape and type of `x` [n, ...] (prepared) and `y` [n]. Where one holds whole
    numbers, or the network has embeddings, random numbers may be no valid input: then two rows of `x` are taken, and
    also where the network cannot run on random ones. A network whose samples mix fails the comparison for every
    batched method, so it falls to the loop, where they cannot; what mixes on rare inputs only is found by `verify`.
    """
    candidates: list[Method] = ["ghost"] if ghost.supports(model) else []
    small = sum(p.numel() for p in trainable(model)) < 1_000_000 and not _convolves(model)
    candidates += ["vmap"] if small or x.device.type != "cpu" else []
    if not candidates:
        return "loop"
    noise = torch.Generator().manual_seed(0)
    try:
        twin = _twin(model, noise)
    except Exception:  # what cannot be tried is not used
        return "loop"

    labels = torch.zeros((2, *y.shape[1:]), dtype=y.dtype, device=y.device)
    tries = [join([x[:1], x[-1:]])]
    if not _takes_whole_numbers(model, x):
        made_up = map_inputs(x, lambda t: torch.randn((2, *t.shape[1:]), generator=noise).to(t))
        tries.insert(0, made_up)
    for inputs in tries:
        expected, raw = clipped_gradient_sum(
            twin, loss_fn, inputs, labels, clip_norm=1.0, contain=True
        )
        if not raw.failed:
            break
    for method in candidates:
        try:
            got, _ = clipped_gradient_sum(
                twin, loss_fn, inputs, labels, clip_norm=1.0, method=method
            )
        except Exception:  # torch.func or the rules do not know this network
            continue
        if float((got - expected).norm()) <= 1e-3 * float(expected.norm()):
            return method
    return "loop"


def _twin(model: nn.Module, noise: torch.Generator) -> nn.Module:
    """Returns a copy to try methods on, in the modes of the real one: a network may mix samples only in training."""
    twin = copied(model)
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # its draws would differ between the methods
    with torch.no_grad():
        # Away from zeros: a zero layer would hide that a gradient is wrong.
        for p in trainable(twin):
            p.add_(0.05 * torch.randn(p.shape, generator=noise).to(p))
    return twin


def _takes_whole_numbers(model: nn.Module, x: Inputs) -> bool:
    """Whether inputs may be names of things, such as tokens, so that a random number could be none of them."""
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    return embeds or any(
        not part.is_floating_point() or bool((part == part.round()).all())
        for part in parts_of(x).values()
    )


def check_separable(model: nn.Module) -> None:
    """Raises RecipeError if a module of `model` would let one sample change the gradient of another."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, BatchNorm)
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
    losses = [one.loss for one in measured if math.isfinite(one.loss)]
    problems = [one.problem for one in measured if one.problem]
    n = len(measured)
    return RawStats(
        examples=n,
        loss=sum(losses) / len(losses) if losses else math.nan,
        share_clipped=sum(one.norm > clip_norm for one in measured) / max(n, 1),
        refused=sum(not math.isfinite(one.norm) for one in measured) - len(problems),
        failed=len(problems),
        problem=problems[0] if problems else "",
        agreed=agreed,
    )
