"""Checks that a pruned network equals the unpruned one with the same channels set to zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedpress.compress.prune.approximate import constant_statistics
from fedpress.compress.prune.dry_runs import CalledFunctions
from fedpress.compress.prune.graph import tensors_in
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import mask_
from fedpress.core.inputs import Example, positional
from fedpress.errors import ModelError
from fedpress.nn.resize import copied

Batch = list[Tensor]
"""The tensors that a model takes as positional inputs."""
TRAINING_TOLERANCE = 1e-3
"""Training mode gets at least this tolerance: norms over few values amplify rounding errors."""
KEEP_MODULE_CURE = (
    "a size written into its forward may be at fault: keep that module as it is by naming it "
    "in `ignore`"
)
"""The cure that both errors of the comparison suggest."""
aten = torch.ops.aten


@torch.no_grad()
def check_parity(
    dense: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    example: Example,
    *,
    tolerance: float = 1e-5,
) -> float:
    """Checks that the pruned network equals the dense one with the same channels zeroed.

    Both networks run in evaluation and in training mode, on a random batch shaped like `example`
    and on a batch with one example more. Floats and the indices of embeddings are random. Other
    integers, and floats that hold different integers, are values of `example`, shuffled between
    examples. In training mode the random draws in `MEANS` (dropout, noise) are replaced by their
    means, because two networks of different shapes would draw different numbers. Training mode and
    the larger batch are skipped if the dense network itself cannot run them. If norms are
    approximate (`plan.approximate`), constants replace their statistics.

    Args:
        dense: the network before pruning.
        pruned: the network after `remove_`.
        plan: the plan that `pruned` was made with.
        example: inputs like those that were traced.
        tolerance: largest difference that is accepted in evaluation mode.

    Returns:
        The largest difference of an output in evaluation mode, divided by the largest absolute
        value in this output (at least 1e-6).

    Raises:
        ModelError: if the pruned network does not run, or a difference is not a number or above
            `tolerance` (in training mode: above `TRAINING_TOLERANCE` if that is larger).
    """
    # The comparison sets torch's seed, which must not change the caller's random numbers.
    with torch.random.fork_rng(devices=[]), constant_statistics(plan):
        return _compare(dense, pruned, plan, example, tolerance)


def _compare(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, example: Example, tolerance: float
) -> float:
    """Compares the two networks in both modes and on two batch sizes; see `check_parity`."""
    small = copied(pruned).eval()
    masked = copied(dense).eval()
    batch, larger = trial_batches(masked, positional(masked, example))
    mask_(masked, plan)
    wanted = _outputs(masked, batch)
    nearly = not _all_finite(wanted) and _all_finite(_outputs(copied(dense).eval(), batch))
    if nearly:
        # Code that normalises weights (weight standardisation) computes 0 / 0 for zeroed channels.
        masked = _masked(dense, plan, nearly=True)
        wanted = _outputs(masked, batch)
    worst = _difference(wanted, small, batch, tolerance, "")

    # A size in the code, as in `view(2, -1)`, may be right for the traced batch size only.
    wanted_of_larger = _try_outputs(masked, larger)
    if wanted_of_larger is not None:
        when = " on a batch of another size"
        worst = max(worst, _difference(wanted_of_larger, small, larger, tolerance, when))

    # Not copies of those that have run: hooks that a first forward registers refer to the original.
    def fresh() -> tuple[nn.Module, nn.Module]:
        return _masked(dense, plan, nearly=nearly), copied(pruned)

    # In training mode norms amplify rounding errors: they alone would exceed a smaller tolerance.
    for each in (batch, larger):
        _compare_training(fresh(), fresh, each, max(tolerance, TRAINING_TOLERANCE))
    return worst


def _masked(dense: nn.Module, plan: PruningPlan, *, nearly: bool = False) -> nn.Module:
    """Returns a copy of `dense` in evaluation mode whose pruned channels are zero, or nearly so."""
    masked = copied(dense).eval()
    mask_(masked, plan, nearly=nearly)
    return masked


def trial_batch(dense: nn.Module, example: Example) -> Batch:
    """Returns random inputs for `parity_fault`, with one example more than `example` if possible.

    Unlike `drawn_batch`, it runs the model to find values on which it runs.
    """
    with torch.random.fork_rng(devices=[]):
        model = copied(dense).eval()
        batch, larger = trial_batches(model, positional(model, example))
        return batch if _try_outputs(model, larger) is None else larger


@dataclass(frozen=True)
class Candidate:
    """A batch on which two networks may be compared.

    Attributes:
        make: returns the inputs.
        calls: the torch functions that the network must call on them, in order; None for any.
    """

    make: Callable[[], Batch]
    calls: Sequence[Any] | None = None


def drawn_batch(example: tuple[Tensor, ...]) -> Batch:
    """Returns random inputs with one example more than `example`, for a model without embeddings.

    A different batch size reveals sizes in the code that are right for the traced batch only.
    """
    return _random_batch(example, [None] * len(example))


@torch.no_grad()
def parity_fault(
    dense: nn.Module,
    make_pruned: Callable[[], nn.Module],
    plan: PruningPlan,
    candidates: Sequence[Candidate],
    *,
    tolerance: float,
) -> str | None:
    """Compares the networks as `check_parity` does, on one batch; returns the problem or None.

    Args:
        dense: the network before pruning.
        make_pruned: makes the pruned network; each network made is run, and may change.
        plan: the plan that it is made with.
        candidates: batches, of which the first is taken on which the masked network runs and
            calls the wanted functions; the last one is taken if there is none.
        tolerance: largest difference that is accepted in evaluation mode.
    """
    with torch.random.fork_rng(devices=[]), constant_statistics(plan):
        small = make_pruned().eval()
        for candidate in candidates:
            batch = candidate.make()
            masked = _masked(dense, plan)
            called = CalledFunctions()
            wanted = _try_outputs(masked, batch, called)
            if wanted is None:
                continue
            # Numbers that are not finite are not compared, so small images must not cause them.
            if candidate.calls is None or (
                candidate.calls == called.functions and _all_finite(wanted)
            ):
                break
        nearly = wanted is not None and not _all_finite(wanted)  # 0 / 0, as in `_compare`
        if nearly:
            masked = _masked(dense, plan, nearly=True)
            wanted = _try_outputs(masked, batch)
        try:
            if wanted is not None and _all_finite(wanted):
                _difference(wanted, small, batch, tolerance, "")
            # The first networks may change, so that others are needed for float64.
            _compare_training(
                (masked, small),
                lambda: (_masked(dense, plan, nearly=nearly), make_pruned()),
                batch,
                TRAINING_TOLERANCE,
            )
        except ModelError as error:
            return error.problem
    return None


def _compare_training(
    networks: tuple[nn.Module, nn.Module],
    make_networks: Callable[[], tuple[nn.Module, nn.Module]],
    batch: Batch,
    tolerance: float,
) -> None:
    """Compares masked and pruned network in training mode, in float32 and if need be in float64.

    Float32 is fast, but batch norms over few examples amplify its rounding errors: if the outputs
    differ by more than `tolerance`, float64 decides. So it does if the outputs are not finite. A
    model that does not run in float64 is judged by float32; one that runs in neither is not
    compared.

    Args:
        networks: the masked and the pruned network; both may change.
        make_networks: makes both once more.
        batch: their inputs.
        tolerance: largest difference that is accepted.
    """
    fault = None
    try:
        if _compare_trained(*networks, batch, tolerance, use_float64=False):
            return
    except ModelError as error:
        fault = error
    is_finite = _compare_trained(*make_networks(), batch, tolerance, use_float64=True)
    if fault is not None and is_finite is None:
        raise fault


def _compare_trained(
    masked: nn.Module, small: nn.Module, batch: Batch, tolerance: float, *, use_float64: bool
) -> bool | None:
    """Compares in training mode and one precision; both models may change.

    Returns:
        Whether the outputs of the masked model are finite, or None if it does not run.
    """
    masked.train()
    small.train()
    if use_float64:
        # Not `masked.double()`: a model may have an attribute `double`.
        nn.Module.double(masked)
        nn.Module.double(small)
        batch = [x.double() if x.is_floating_point() else x for x in batch]
    with _RandomMeans():  # type: ignore[no-untyped-call]
        wanted = _try_outputs(masked, batch)
        if wanted is None:
            return None
        _difference(wanted, small, batch, tolerance, " in training mode")
    return _all_finite(wanted)


def _difference(
    wanted: Sequence[Tensor], small: nn.Module, batch: Batch, tolerance: float, when: str
) -> float:
    """Returns the largest difference between the outputs of `small` and `wanted`, see `_error`.

    Raises:
        ModelError: if `small` does not run, or the difference is above `tolerance` or not a number.
    """
    try:
        errors = []
        for a, b in zip(wanted, _outputs(small, batch), strict=True):
            if a.numel():
                errors.append(_error(a, b))
        # torch's maximum is NaN if one value is NaN; Python's `max` may return another value.
        worst = torch.stack(errors).max().item() if errors else 0.0
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the pruned network does not run{when} ({reason})",
            place="pruned",
            cure=KEEP_MODULE_CURE,
        ) from error

    # `not <=` instead of `>`, so that NaN fails too.
    if not worst <= tolerance:
        raise ModelError(
            (
                f"the pruned network differs from the masked one by {worst:.2g}{when}, more "
                f"than {tolerance:g}"
            ),
            place="pruned",
            cure=KEEP_MODULE_CURE,
        )
    return worst


def _error(wanted: Tensor, given: Tensor) -> Tensor:
    """Returns the largest difference, divided by the largest finite absolute value of `wanted`.

    Entries that are NaN in both, or the same infinity in both, count as equal.
    """
    if wanted.shape != given.shape:
        raise ValueError(
            f"an output of shape {tuple(wanted.shape)} has become {tuple(given.shape)}"
        )
    same = (wanted == given) | (wanted.isnan() & given.isnan())
    finite = wanted[wanted.isfinite()]
    # Not relative to each number: the rounding error of a sum depends on its largest terms.
    largest = finite.abs().max() if finite.numel() else wanted.new_tensor(0.0)
    difference = (wanted - given).masked_fill(same, 0).abs().max()
    return (difference / largest.clamp_min(1e-6)).double()


def _outputs(model: nn.Module, batch: Batch, called: CalledFunctions | None = None) -> list[Tensor]:
    """Returns the outputs of `model`, float32 or float64, with the same random draws each time.

    Args:
        model: the model.
        batch: its inputs.
        called: gets the torch functions that the model calls.
    """
    torch.manual_seed(0)
    given = [x.clone() for x in batch]  # forward may write into its inputs
    with called or nullcontext():
        result = model(*given)
    outputs = []
    for output in tensors_in(result):
        outputs.append(output if output.dtype == torch.float64 else output.float())
    return outputs


def _all_finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def _try_outputs(
    model: nn.Module, batch: Batch, called: CalledFunctions | None = None
) -> list[Tensor] | None:
    """Returns the outputs, or None if the model cannot run on this batch or in this mode."""
    try:
        return _outputs(model, batch, called)
    except Exception:  # if the dense network does not run, there is nothing to compare with
        return None


def trial_batches(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Batch, Batch]:
    """Returns a batch of the size of `example`, and one with one example more.

    Three kinds of values are tried, and the first on which the model runs is taken: random values;
    those of `example`, shuffled between examples; `example` itself with its first row repeated.
    """
    size = _examples(example)
    draw = torch.Generator().manual_seed(0)
    drawn = _random_batch(example, _vocabularies(model, example), draw)
    shuffled = []
    extended = []
    for x in example:
        has_examples = _has_examples(x, size)
        shuffled.append(_shuffled(x, size + 1, draw) if has_examples else x)
        extended.append(torch.cat([x, x[:1]]) if has_examples else x)
    for larger in (drawn, shuffled):
        batch = _without_last(larger, example, size)
        if _try_outputs(model, batch) is not None:
            return batch, larger
    return _without_last(extended, example, size), extended


def _random_batch(
    example: tuple[Tensor, ...],
    vocabularies: Sequence[int | None],
    draw: torch.Generator | None = None,
) -> Batch:
    """Returns random values of the kinds in `example`, with one example more; see `_drawn`."""
    draw = draw or torch.Generator().manual_seed(0)
    size = _examples(example)
    drawn = []
    for x, vocabulary in zip(example, vocabularies, strict=True):
        drawn.append(_drawn(x, vocabulary, size, draw))
    return drawn


def _examples(example: Sequence[Tensor]) -> int:
    """Returns how many examples the inputs hold: the length of the first axis of the first one."""
    return next((x.shape[0] for x in example if x.dim()), 0)


def _has_examples(x: Tensor, size: int) -> bool:
    """Returns whether the first axis of an input counts examples, so that its length is `size`."""
    return x.dim() > 0 and x.shape[0] == size


def _without_last(larger: Batch, example: tuple[Tensor, ...], size: int) -> Batch:
    """Returns the first `size` examples of `larger`, a batch with one example more."""
    batch = []
    for x, like in zip(larger, example, strict=True):
        batch.append(x[:size] if _has_examples(like, size) else x)
    return batch


def _drawn(x: Tensor, vocabulary: int | None, size: int, draw: torch.Generator) -> Tensor:
    """Returns random values of the type of `x`, with one example more if axis 0 counts examples.

    Args:
        x: an input.
        vocabulary: number of rows of the embedding that takes `x` as indices, or None.
        size: number of examples in the batch.
        draw: generator of the values.
    """
    has_examples = _has_examples(x, size)
    shape = (x.shape[0] + 1, *x.shape[1:]) if has_examples else tuple(x.shape)
    if vocabulary is not None:
        return torch.randint(vocabulary, shape, generator=draw).to(x.device, x.dtype)
    # Floats that hold different integers may be indices, which must stay in their range.
    may_be_indices = _is_integral(x) and bool((x != x.flatten()[:1]).any())
    if x.is_floating_point() and not may_be_indices:
        return torch.randn(shape, generator=draw).to(x.device, x.dtype)
    return _shuffled(x, shape[0], draw) if has_examples else x


def _shuffled(x: Tensor, examples: int, draw: torch.Generator) -> Tensor:
    """Returns new examples: each value is that of a random example at the same position."""
    which = torch.randint(x.shape[0], (examples, *x.shape[1:]), generator=draw).to(x.device)
    return x.gather(0, which)


def _is_integral(x: Tensor) -> bool:
    return not x.is_floating_point() or bool((x == x.round()).all())


def _vocabularies(model: nn.Module, example: tuple[Tensor, ...]) -> list[int | None]:
    """Returns for each input the number of rows of the embedding that takes it as indices, or None.

    The model runs on random zeros and ones, which are valid indices of any embedding. Each
    embedding's indices are recorded, and an input is recognised by its values.
    """
    draw = torch.Generator().manual_seed(1)
    bits: list[Tensor] = []
    candidates: list[bool] = []
    for x in example:
        may_be_words = not x.is_complex() and x.dtype != torch.bool and x.numel() > 0
        may_be_words = may_be_words and _is_integral(x)
        candidates.append(may_be_words)
        if may_be_words:
            x = torch.randint(2, x.shape, generator=draw).to(x.device, x.dtype)
        bits.append(x)

    if not any(candidates):
        return [None] * len(example)
    # If the model fails on these values, the embeddings that did not run are not found; inputs
    # that are their indices are then shuffled.
    lookups = _Lookups()
    with lookups:
        _try_outputs(model, bits)
    found: list[int | None] = []
    for x, may_be_words in zip(bits, candidates, strict=True):
        rows = []
        for words, count in lookups.seen if may_be_words else ():
            if torch.equal(words.flatten().double(), x.flatten().double()):
                rows.append(count)
        found.append(min(rows, default=None))
    return found


class _Lookups(TorchFunctionMode):
    """Records the indices that embeddings get, with their number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, and records it if it is an embedding."""
        if func in (F.embedding, F.embedding_bag) and len(args) > 1:
            self.seen.append((args[0].detach(), args[1].shape[0]))
        return func(*args, **(kwargs or {}))


class _RandomMeans(TorchDispatchMode):
    """Replaces the random draws in `MEANS` by the means of their distributions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or returns the mean of what it draws."""
        options = kwargs or {}
        mean = MEANS.get(func.overloadpacket)
        if mean is None:
            return func(*args, **options)
        return mean(func, args, options)


def _filled(value: float) -> Any:
    """Returns a function that fills the drawn tensor with `value`."""
    return lambda func, args, options: func(*args, **options).fill_(value)


def _in_place(default: float, mean: Any) -> Any:
    """Returns a function that fills the tensor with the mean of its distribution.

    Args:
        default: the mean if the call gives no parameters of the distribution.
        mean: function that computes the mean from these parameters.
    """

    def fill(func: Any, args: Any, options: Any) -> Any:
        tensor, *parameters = args
        return tensor.fill_(mean(*parameters) if parameters else default)

    return fill


def _bernoulli(func: Any, args: Any, options: Any) -> Any:
    """Returns the probabilities instead of draws of 0 and 1.

    In `torch.bernoulli(x)` the probabilities are `x`; in `torch.bernoulli(x, p)` and
    `x.bernoulli_(p)` they are `p`.
    """
    x = args[0]
    prob = args[1] if len(args) > 1 else None
    if func.overloadpacket is aten.bernoulli:
        return x.clone() if prob is None else torch.full_like(x, prob)
    if isinstance(prob, Tensor):
        return x.copy_(prob)
    return x.fill_(0.5 if prob is None else prob)


MEANS: dict[Any, Any] = {
    aten.bernoulli: _bernoulli,
    aten.bernoulli_: _bernoulli,
    aten.native_dropout: lambda func, args, options: (
        args[0].clone(),
        torch.ones_like(args[0], dtype=torch.bool),
    ),
    aten.rand: _filled(0.5),
    aten.rand_like: _filled(0.5),
    aten.randn: _filled(0.0),
    aten.randn_like: _filled(0.0),
    aten.uniform_: _in_place(0.5, lambda low, high=1.0: (low + high) / 2),
    aten.normal_: _in_place(0.0, lambda mean, std=1.0: mean),
    aten.exponential_: _in_place(1.0, lambda rate: 1 / rate),
}
"""Random operation -> function of (operation, args, options) that returns the mean of the draw."""
