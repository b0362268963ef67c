"""The sum of clipped per-sample gradients for DP-SGD, with sensitivity `clip_norm`.

There are three methods: "loop" (one backward pass per sample: slow, always correct), "ghost" and
"vmap" (the whole batch at once). The fast methods can be compared with the loop while they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, call, join, map_inputs, tensors_by_name
from fedpress.core.outputs import as_float32, rows_of_outputs
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
"""How the sum is computed; see the text at the top of this file."""

Verify = Literal["nothing", "losses", "gradients"]
"""What is compared with the plain loop in every chunk of samples."""

METHODS: dict[str, Callable[[list[Tensor], Query], Measured]] = {
    "ghost": ghost.add_ghost_,
    "vmap": add_vmap_,
    "loop": add_loop_,
}
"""Name of a method -> function that adds the clipped gradients of samples to a sum."""


@dataclass(frozen=True)
class RawStats:
    """Statistics of one batch.

    NOT private: they have no noise, so they must not leave the client.

    Attributes:
        examples: size of the batch.
        loss: mean of the finite losses; nan if there are none.
        share_clipped: share of the samples whose gradient norm was above the clip norm.
        refused: number of samples with a NaN or infinite gradient; they contributed zero.
        failed: number of samples for which the network raised an error, or changed its own buffers
            or parameters; they contributed zero too.
        problem: the problem of the first failed sample; "" if there is none.
        agreed: False if the chosen method failed or differed from the plain loop, so that the loop
            repeated some samples.
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
    by at most `clip_norm` in L2, even if the sample's gradient is NaN or infinite, if its square
    overflows, or if the network raises an error. With "ghost" and "vmap" this holds up to rounding
    errors of kernels whose order of summation depends on the batch.

    Args:
        model: the network. It has d trainable values; the sum has them in the order of
            `core.parameters`.
        loss_fn: outputs and labels of one example [1, ...] -> its loss.
        x: prepared inputs [n, ...], one tensor or several by name; n may be 0.
        y: labels [n].
        clip_norm: the L2 bound of one sample.
        method: name in `METHODS`; see `choose_method`.
        chunk: number of samples that are processed at a time, to limit memory.
        verify: what is compared with the loop in every chunk: "losses" of 4 samples, or "gradients"
            (losses and norms) of 8 samples; norms are left out if dropout is active. After a
            mismatch, or if the method raises an error, the loop repeats the chunk.
        tolerate_writes: if True, changes of buffers or parameters by a forward pass are undone, and
            the sample contributes zero. If False, such a change raises an error. The error must
            stay on the client, because a single sample can cause it.

    Returns:
        The sum, float32 [d], and statistics. Both have no noise: they must not leave the client.

    Raises:
        RecipeError: if a normalisation mixes the samples of a batch or keeps statistics of them, if
            the method is unknown, or if a forward pass changed a buffer or parameter (unless
            `tolerate_writes`).
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
        views: `total` as one view per trainable parameter.
        measured: loss, norm and problem of each sample so far.
        agreed: whether all chunks were computed by the chosen method. False if the loop had to
            repeat a chunk.
        wrote: the first change of the model by a forward pass, and a cure; "" if there is none.
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
        """Adds the samples of a chunk by `method`; returns whether this succeeded.

        Nothing is added if the method raised an error, if it differs from the loop, or if the model
        changed itself. In a batch it is not known which sample caused such a change.
        """
        # A method that raises may already have added some samples.
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
        """Adds the samples of a chunk one by one, so that no sample can influence another."""
        found = add_loop_(self.views, query, self.guard)
        self.measured += found
        for sample in found:
            if not self.wrote and sample.problem.startswith(WROTE_PREFIX):
                self.wrote = sample.problem


def _verified(views: list[Tensor], query: Query, method: Method, verify: Verify) -> Measured | None:
    """Adds a chunk by `method`; returns loss and norm of each sample.

    Returns None if the method raised an error, or if a compared sample differs from the loop.
    """
    try:
        measured = METHODS[method](views, query)
        rows = _rows_to_verify(query.x, 8 if verify == "gradients" else 4)
        with _without_dropout(query.model) as drew:
            # With dropout the two runs would draw different masks, so losses without dropout are
            # compared. That takes a third of the time of gradients.
            together = _losses(query, rows) if drew else [measured[row] for row in rows]
            if verify == "gradients" and not drew:
                alone = add_loop_([torch.zeros_like(view) for view in views], query.take(rows))
            else:
                # Only losses are compared, so all norms are set to 0.
                together = [sample._replace(norm=0.0) for sample in together]
                alone = [_losses(query.one(row), [0])[0] for row in rows]
    except Exception:
        # torch.func or a rule of `ghost` does not support this network on these values.
        return None
    # In 16 bits, results differ more between batch sizes.
    tolerance = 0.1 if torch.is_autocast_enabled(query.x.device.type) else 2e-3
    agree = all(_agree(a, b, tolerance) for a, b in zip(together, alone, strict=True))
    return measured if agree else None


@torch.no_grad()
def _losses(query: Query, rows: list[int]) -> Measured:
    """Runs the whole batch at once and returns the losses of `rows`; norms are set to 0."""
    outputs = call(query.model, query.x)
    found = []
    # In float32 even under autocast, because losses are compared.
    for row in rows:
        at = slice(row, row + 1)
        found.append(
            Sample(float(query.loss_fn(as_float32(rows_of_outputs(outputs, at)), query.y[at])), 0.0)
        )
    return found


def _rows_to_verify(x: Inputs, count: int) -> list[int]:
    """Returns the indices of up to `count` rows of `x` [n, ...] to compare.

    They are the largest input, its two neighbours, the smallest input, and evenly spread rows. If a
    network mixes examples only for rare inputs, it probably does so for extreme inputs, and the
    results of their neighbours change.
    """
    n = len(x)
    if n <= count:
        return list(range(n))
    sizes = [part.reshape(n, -1).double().norm(dim=1) for part in tensors_by_name(x).values()]
    size = sizes[0] if len(sizes) == 1 else torch.stack(sizes).norm(dim=0)
    # Inputs with NaN count as the largest ones.
    size = size.nan_to_num(math.inf)
    spread = torch.linspace(0, n - 1, count).long().tolist()
    largest = int(size.argmax())
    extreme = [largest, (largest + 1) % n, (largest - 1) % n, int(size.argmin())]
    return list(dict.fromkeys([*extreme, *spread]))[:count]


def _agree(a: Sample, b: Sample, tolerance: float) -> bool:
    """Returns whether loss and norm of a sample are equal up to `tolerance`."""
    # A sample on which either run failed counts as different.
    if a.problem or b.problem:
        return False
    return _close(a.loss, b.loss, tolerance) and _close(a.norm, b.norm, tolerance)


def _close(one: float, other: float, tolerance: float) -> bool:
    if not math.isfinite(one) and not math.isfinite(other):
        return True
    # The constant allows rounding errors of values near 0.
    return abs(one - other) <= tolerance * (1e-3 + abs(other))


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switches dropout off; yields whether any dropout layer was active."""
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

    Methods are tried on two random inputs of the shape and type of `x`. Two rows of `x` are used
    instead if random numbers may be invalid inputs (whole numbers such as tokens, or a network with
    embeddings), or if the network fails on the random inputs. For a network that mixes samples,
    both fast methods differ from the loop, so the result is "loop". If a network mixes samples for
    rare inputs only, `verify` of `clipped_gradient_sum` may find this later.

    Args:
        model: the network.
        loss_fn: outputs and labels of one example -> its loss.
        x: prepared inputs [n, ...].
        y: labels [n].
    """
    candidates: list[Method] = ["ghost"] if ghost.supports(model) else []
    # On a CPU vmap is fast only for small networks without convolutions.
    small = sum(p.numel() for p in trainable(model)) < 1_000_000 and not _convolves(model)
    if small or x.device.type != "cpu":
        candidates.append("vmap")
    if not candidates:
        return "loop"
    with _exact_products():
        return _fastest_correct(model, loss_fn, x, y, candidates)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Switches TF32 off inside the block.

    By default GPUs round the factors of a convolution to 11 bits. Two correct methods then differ
    by nearly as much as `choose_method` allows.
    """
    # The module is a class in disguise, which type checkers do not see.
    cudnn: Any = torch.backends.cudnn
    places = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    for place in places:
        place.fp32_precision = "ieee"
    try:
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


def _fastest_correct(
    model: nn.Module, loss_fn: LossFn, x: Inputs, y: Tensor, candidates: list[Method]
) -> Method:
    """Returns the first of `candidates` that agrees with the loop; see `choose_method`."""
    # A fixed seed: random inputs need not be secret, and a network must always get the same method.
    noise = torch.Generator().manual_seed(0)
    try:
        twin = _trial_copy(model, noise)
    except Exception:
        # Without a copy no method can be tried.
        return "loop"

    # Zeros are valid targets of every task.
    labels = torch.zeros((2, *y.shape[1:]), dtype=y.dtype, device=y.device)
    tries = [join([x[:1], x[-1:]])]
    if not _takes_whole_numbers(model, x):
        made_up = map_inputs(x, lambda t: torch.randn((2, *t.shape[1:]), generator=noise).to(t))
        tries.insert(0, made_up)
    # Random inputs first, because real rows may be equal or zero and hide a wrong gradient.
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
            # torch.func or a rule of `ghost` does not support this network.
            continue
        if float((got - expected).norm()) <= 1e-3 * float(expected.norm()):
            return method
    return "loop"


def _trial_copy(model: nn.Module, noise: torch.Generator) -> nn.Module:
    """Returns a copy of `model` on which methods are tried."""
    # Modules keep their mode, because a network may mix samples only in training mode.
    twin = copied(model)
    for module in twin.modules():
        # Dropout is off, because two methods would draw different masks.
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    with torch.no_grad():
        # Noise is added to parameters, because a layer of zeros would hide a wrong gradient.
        for p in trainable(twin):
            p.add_(0.05 * torch.randn(p.shape, generator=noise).to(p))
    return twin


def _takes_whole_numbers(model: nn.Module, x: Inputs) -> bool:
    """Returns whether inputs may be indices such as tokens, where random numbers are invalid."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return True
    return any(_is_whole(part) for part in tensors_by_name(x).values())


def _is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() or bool((values == values.round()).all())


def check_separable(model: nn.Module) -> None:
    """Raises RecipeError if a normalisation mixes samples, or keeps statistics of them."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, BatchNorm)
        # Without running statistics, a batch norm uses batch statistics even in evaluation mode.
        if batch_norm and (module.training or module.running_mean is None):
            raise RecipeError(
                (
                    "batch normalisation with the statistics of the batch mixes its samples, so "
                    "there are no per-sample gradients"
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
        # Failed samples have no finite norm either, but are counted separately.
        refused=not_finite - len(problems),
        failed=len(problems),
        problem=problems[0] if problems else "",
        agreed=agreed,
    )
