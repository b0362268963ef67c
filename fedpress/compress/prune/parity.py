"""Whether a cut network computes what the whole one does with the same channels zeroed: both run and are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fedpress.compress.prune.approximate import constant_statistics
from fedpress.compress.prune.graph import tensors_in
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import mask_
from fedpress.core.inputs import Example, positional
from fedpress.errors import ModelError
from fedpress.nn.resize import copied

Batch = list[Tensor]
WHILE_TRAINING = (
    1e-3  # the least that is tolerated there: norms over few values enlarge what rounding leaves
)
CURE = "a size written into its forward may be at fault: keep that module as it is by naming it in `ignore`"
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
    """Checks that the pruned network computes what the dense one does with the same channels zeroed.

    Both run in evaluation and in training mode, on a random batch shaped like `example` and on one with one example
    more. Floats are drawn; what an embedding looks up is drawn below its number of words; other whole numbers are those
    of the example, mixed. In training mode the mean stands for all chance (dropout, noise), since masks of another
    shape are other masks. A mode or batch size that the dense network itself cannot run says nothing and is left out.
    Of a cut through norms (`plan.approximate`) all but their statistics is compared.

    Returns:
        The largest difference of an output in evaluation mode, relative to the largest number in it, or to 1e-6.

    Raises:
        ModelError: if the pruned network does not run, or the difference is above `tolerance` or not a number.
    """
    with torch.random.fork_rng(devices=[]), constant_statistics(plan):
        return _compare(dense, pruned, plan, example, tolerance)


def _compare(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, example: Example, tolerance: float
) -> float:
    masked, small = copied(dense).eval(), copied(pruned).eval()
    batch, larger = trial_batches(masked, positional(masked, example))
    mask_(masked, plan)
    wanted = _outputs(masked, batch)
    if not _finite(wanted) and _finite(_outputs(copied(dense).eval(), batch)):
        masked = copied(dense).eval()
        mask_(masked, plan, nearly=True)
        wanted = _outputs(masked, batch)
    worst = _difference(wanted, small, batch, tolerance, "")
    more = _attempt(masked, larger)
    if more is not None:
        worst = max(
            worst, _difference(more, small, larger, tolerance, " on a batch of another size")
        )
    for each in (batch, larger):
        _compare_training(masked, small, each, max(tolerance, WHILE_TRAINING))
    return worst


def trial_batch(dense: nn.Module, example: Example) -> Batch:
    """Returns inputs for `parity_fault`: of one example more than `example`, if `dense` runs on so many."""
    with torch.random.fork_rng(devices=[]):
        model = copied(dense).eval()
        batch, larger = trial_batches(model, positional(model, example))
        return batch if _attempt(model, larger) is None else larger


@torch.no_grad()
def parity_fault(
    dense: nn.Module, pruned: nn.Module, plan: PruningPlan, batch: Batch, *, tolerance: float
) -> str | None:
    """Says what `check_parity` would find wrong on one batch, at a fraction of its cost; None if nothing is."""
    with torch.random.fork_rng(devices=[]), constant_statistics(plan):
        masked, small = copied(dense).eval(), copied(pruned).eval()
        mask_(masked, plan)
        wanted = _attempt(masked, batch)
        if wanted is not None and not _finite(wanted):  # 0 / 0, as in `_compare`
            masked = copied(dense).eval()
            mask_(masked, plan, nearly=True)
            wanted = _attempt(masked, batch)
        try:
            if wanted is not None and _finite(wanted):
                _difference(wanted, small, batch, tolerance, "")
            try:
                _compare_training(masked, small, batch, WHILE_TRAINING, precisions=(False,))
            except ModelError:
                _compare_training(masked, small, batch, WHILE_TRAINING)
        except ModelError as error:
            return error.problem
    return None


def _compare_training(
    masked: nn.Module,
    small: nn.Module,
    batch: Batch,
    tolerance: float,
    precisions: Sequence[bool] = (True, False),
) -> None:
    """Compares in training mode, in float64 where the model can: batch norms by few examples enlarge errors."""
    for wide in precisions:
        both = [copied(model).train() for model in (masked, small)]
        values = batch
        if wide:
            both = [nn.Module.double(model) for model in both]  # users name attributes so
            values = [x.double() if x.is_floating_point() else x for x in batch]
        with _Means():  # type: ignore[no-untyped-call]
            wanted = _attempt(both[0], values)
            if wanted is not None:
                _difference(wanted, both[1], values, tolerance, " in training mode")
                return


def _difference(
    wanted: Sequence[Tensor], small: nn.Module, batch: Batch, tolerance: float, when: str
) -> float:
    """Returns how far the outputs of `small` are from those that are wanted, relative to the largest of each."""
    try:
        errors = [
            _error(a, b) for a, b in zip(wanted, _outputs(small, batch), strict=True) if a.numel()
        ]
        # Of tensors, since the largest of Python's numbers is not always NaN where one of them is.
        worst = torch.stack(errors).max().item() if errors else 0.0
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the pruned network does not run{when} ({reason})", place="pruned", cure=CURE
        ) from error
    if not worst <= tolerance:
        raise ModelError(
            (
                f"the pruned network differs from the masked one by {worst:.2g}{when}, more "
                f"than {tolerance:g}"
            ),
            place="pruned",
            cure=CURE,
        )
    return worst


def _error(wanted: Tensor, given: Tensor) -> Tensor:
    """Returns the largest difference relative to the largest number; where both are no number, there is none."""
    if wanted.shape != given.shape:
        raise ValueError(
            f"an output of shape {tuple(wanted.shape)} has become {tuple(given.shape)}"
        )
    same = (wanted == given) | (wanted.isnan() & given.isnan())
    largest = (
        wanted[wanted.isfinite()].abs().max() if wanted.isfinite().any() else wanted.new_tensor(0.0)
    )
    return ((wanted - given).masked_fill(same, 0).abs().max() / largest.clamp_min(1e-6)).double()


def _outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    torch.manual_seed(0)
    given = [x.clone() for x in batch]  # forward may write into its inputs
    return [
        each if each.dtype == torch.float64 else each.float() for each in tensors_in(model(*given))
    ]


def _finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(output.isfinite().all()) for output in outputs)


def _attempt(model: nn.Module, batch: Batch) -> list[Tensor] | None:
    try:
        return _outputs(model, batch)
    except Exception:  # the dense network cannot run so, so nobody will
        return None


def trial_batches(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Batch, Batch]:
    """Returns a batch like `example` and one with one more, of the first values on which `model` runs."""
    size = next((x.shape[0] for x in example if x.dim()), 0)
    draw = torch.Generator().manual_seed(0)
    drawn = [
        _drawn(x, vocabulary, size, draw)
        for x, vocabulary in zip(example, _vocabularies(model, example), strict=True)
    ]
    mixed = [_mixed(x, size + 1, draw) if _counts(x, size) else x for x in example]
    for larger in (drawn, mixed):
        batch = _cut(larger, example, size)
        if _attempt(model, batch) is not None:
            return batch, larger
    # The example itself, on which the model was traced; its first row stands for one more.
    larger = [torch.cat([x, x[:1]]) if _counts(x, size) else x for x in example]
    return _cut(larger, example, size), larger


def _counts(x: Tensor, size: int) -> bool:
    """Whether the first axis of an input counts the `size` examples of the batch."""
    return x.dim() > 0 and x.shape[0] == size


def _cut(larger: Batch, example: tuple[Tensor, ...], size: int) -> Batch:
    """Returns the first `size` examples of a batch with one more than `example`."""
    return [x[:size] if _counts(y, size) else x for x, y in zip(larger, example, strict=True)]


def _drawn(x: Tensor, vocabulary: int | None, size: int, draw: torch.Generator) -> Tensor:
    """Returns random values of the kind of `x`, one example more if its first axis counts `size` examples."""
    more = _counts(x, size)
    shape = (x.shape[0] + 1, *x.shape[1:]) if more else tuple(x.shape)
    if vocabulary is not None:
        return torch.randint(vocabulary, shape, generator=draw).to(x.device, x.dtype)
    if x.is_floating_point() and not (_is_integral(x) and bool((x != x.flatten()[:1]).any())):
        return torch.randn(shape, generator=draw).to(x.device, x.dtype)
    return _mixed(x, shape[0], draw) if more else x


def _mixed(x: Tensor, examples: int, draw: torch.Generator) -> Tensor:
    """Returns examples each value of which is that of one of the examples of `x` at the same place."""
    which = torch.randint(x.shape[0], (examples, *x.shape[1:]), generator=draw).to(x.device)
    return x.gather(0, which)


def _is_integral(x: Tensor) -> bool:
    return not x.is_floating_point() or bool((x == x.round()).all())


def _vocabularies(model: nn.Module, example: tuple[Tensor, ...]) -> list[int | None]:
    """Returns for each input the number of words of the smallest embedding that looks its values up, or None."""
    draw = torch.Generator().manual_seed(1)
    may = [
        not x.is_complex() and x.dtype != torch.bool and x.numel() > 0 and _is_integral(x)
        for x in example
    ]
    bits = [
        torch.randint(2, x.shape, generator=draw).to(x.device, x.dtype) if each else x
        for x, each in zip(example, may, strict=True)
    ]
    lookups = _Lookups()
    with lookups:
        _attempt(model, bits)
    found: list[int | None] = []
    for x, each in zip(bits, may, strict=True):
        rows = [
            n
            for ids, n in lookups.seen
            if each and torch.equal(ids.flatten().double(), x.flatten().double())
        ]
        found.append(min(rows, default=None))
    return found


class _Lookups(TorchFunctionMode):
    """Notes what embeddings look up, and in how many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`."""
        if func in (F.embedding, F.embedding_bag) and len(args) > 1:
            self.seen.append((args[0].detach(), args[1].shape[0]))
        return func(*args, **(kwargs or {}))


class _Means(TorchDispatchMode):
    """Replaces what is drawn at random by its mean, whatever the shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or gives the mean."""
        mean = MEANS.get(func.overloadpacket)
        return func(*args, **(kwargs or {})) if mean is None else mean(func, args, kwargs or {})


def _filled(value: float) -> Any:
    return lambda func, args, options: func(*args, **options).fill_(value)


def _in_place(first: float, mean: Any) -> Any:
    """Fills the tensor with the mean of its distribution, whose parameters follow it; without any with `first`."""
    return lambda func, args, options: args[0].fill_(mean(*args[1:]) if len(args) > 1 else first)


def _bernoulli(func: Any, args: Any, options: Any) -> Any:
    prob = args[1] if len(args) > 1 else None
    if func.overloadpacket is aten.bernoulli:
        return args[0].clone() if prob is None else torch.full_like(args[0], prob)
    prob = 0.5 if prob is None else prob
    return args[0].copy_(prob) if isinstance(prob, Tensor) else args[0].fill_(prob)


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
