"""Counts a model's parameters, multiply-adds and bytes, and measures its latency."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fedpress.core.inputs import Example, call, map_inputs, tensors_of
from fedpress.core.threads import torch_threads

T = TypeVar("T")


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, in milliseconds.

    Attributes:
        median_ms: median over the timed calls.
        spread_ms: interquartile range: third quartile less the first.
    """

    median_ms: float
    spread_ms: float


def parameters(model: nn.Module) -> int:
    """Returns the number of values in all parameters; a shared parameter counts once.

    >>> parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in model.parameters())


def state_bytes(model: nn.Module) -> int:
    """Returns the bytes of all parameters and saved buffers; a shared tensor counts once.

    Shared is a tensor that the model has under several names. A buffer that is a part of another
    tensor counts by itself, as packed files store it.

    >>> state_bytes(nn.Linear(3, 2))
    32
    """
    total = 0
    seen = set()
    # `keep_vars` gives the tensors themselves: on the meta device they have no addresses.
    for tensor in model.state_dict(keep_vars=True).values():
        address = tensor.data_ptr() or id(tensor)
        memory = (address, tensor.dtype, tensor.shape, tensor.stride())
        if memory not in seen:
            seen.add(memory)
            total += tensor.numel() * tensor.element_size()
    return total


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of attention; the arguments are shapes [..., length, width]."""
    *batch, length, width = query
    flops: int = 2 * prod(batch) * length * key[-2] * (width + value[-1])
    return flops


def _recurrent(x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of a recurrent layer; the arguments are shapes."""
    flops: int = 2 * prod(x[:-1]) * (prod(w_ih) + prod(w_hh))
    return flops


# Fused CPU kernels that torch's counter does not know. Without these entries it would count 0 for
# attention and recurrent layers.
_UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
}


@torch.no_grad()
def macs(model: nn.Module, example: Example) -> int:
    """Counts the multiply-adds of convolutions and matrix products in one forward pass.

    torch's FlopCounterMode counts the operations that really run, with two FLOPs per multiply-add.
    If the model fails on a batch of one example, it gets a batch with this example twice, and the
    count is halved.

    Args:
        model: any module.
        example: its inputs [n, ...]. The count is for all n examples; pass a batch of 1 for the
            cost of one.

    >>> macs(nn.Linear(3, 2), torch.zeros(1, 3))
    6
    """

    def count(given: Example) -> int:
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            call(model, given)
        return int(counter.get_total_flops())

    with _evaluating(model):
        flops, copies = _run_with_one_or_two(count, example)
    return flops // (2 * copies)


@torch.no_grad()
def compute_one(model: nn.Module, example: Example) -> None:
    """Computes what `macs` counts, for its errors alone: counting loads torch's compiler first."""
    with _evaluating(model):
        _run_with_one_or_two(lambda given: call(model, given), example)


@torch.no_grad()
def activations(model: nn.Module, example: Example) -> int:
    """Returns the number of output values of all innermost modules in one forward pass.

    If the model fails on a batch of one example, it gets a batch with this example twice, and the
    count is halved.

    >>> activations(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), torch.zeros(1, 3))
    4
    """
    counts: list[int] = []

    def note(module: nn.Module, args: object, out: object) -> None:
        outputs = out if isinstance(out, tuple | list) else [out]
        counts.extend(t.numel() for t in outputs if isinstance(t, Tensor))

    def count(given: Example) -> int:
        counts.clear()
        call(model, given)
        return sum(counts)

    # Containers return the outputs of the modules in them, which would be counted twice.
    hooks = []
    for module in model.modules():
        is_innermost = not list(module.children())
        if is_innermost:
            hooks.append(module.register_forward_hook(note))
    try:
        with _evaluating(model):
            numbers, copies = _run_with_one_or_two(count, example)
    finally:
        for hook in hooks:
            hook.remove()
    return numbers // copies


@torch.no_grad()
def latency(model: nn.Module, example: Example, *, repeats: int = 30, warmup: int = 5) -> Latency:
    """Measures the time of one forward pass on one example, in eager torch on one thread.

    If the model fails on a batch of one example, it gets a batch with this example twice, and the
    time is halved. The number
    of threads and the model's modes are restored.

    Args:
        model: any module.
        example: its inputs [n, ...], of which the first example is used.
        repeats: number of timed calls.
        warmup: number of calls before the timed ones, during which caches fill and torch chooses
            kernels.
    """

    def clock(given: Example) -> list[float]:
        times = []
        for _ in range(warmup + repeats):
            start = perf_counter()
            call(model, given)
            times.append(1e3 * (perf_counter() - start))
        return times

    # With several threads the time depends on what else the machine does.
    with torch_threads(1), _evaluating(model):
        times, copies = _run_with_one_or_two(clock, map_inputs(example, lambda t: t[:1]))
    # The median is not moved by a few slow calls, as a mean would be.
    each = torch.tensor(times[warmup:]) / copies
    low, median, high = each.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return Latency(median, high - low)


def _run_with_one_or_two(run: Callable[[Example], T], given: Example) -> tuple[T, int]:
    """Calls `run` on `given`; if that fails, on a batch of two copies of it.

    Some networks cannot take a batch of one, for instance because of a `squeeze()`.

    Returns:
        The result, and the number of copies of the example in it: 1 or 2.
    """
    try:
        return run(given), 1
    except Exception as alone:
        # Only a batch of one is doubled. An error on any other batch is not about its size.
        if any(x.dim() == 0 or len(x) != 1 for x in tensors_of(given)):
            raise
        try:
            return run(map_inputs(given, lambda t: torch.cat([t, t]))), 2
        except Exception:
            raise alone from None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is in evaluation mode; its modes are restored afterwards."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
