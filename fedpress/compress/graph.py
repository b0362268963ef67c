"""The channels of a model that can go, and what goes with each: parameters, sizes in code, multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fedpress.calls import Number, Numbers
from fedpress.errors import ModelError

Example = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Slice:
    """Indices [channels, repeats] along one axis of a parameter or buffer, and what the tensor does with them."""

    tensor: str
    axis: int
    role: str  # "write" (weights that compute the channel), "read" (weights that sum over it), "scale", "follow"
    index: Tensor


@dataclass(frozen=True)
class Layer:
    """Channels that touch the same tensors along the same axes, for instance the residual stream of a stage."""

    name: str
    slices: tuple[Slice, ...]

    @property
    def channels(self) -> int:
        """Number of removable channels."""
        return len(self.slices[0].index)

    @property
    def unit(self) -> int:
        """Width that goes with one removable channel: 1, or more where channels are tied (groups, heads).

        What reads the channel tells it: of a recurrent or gated layer several rows of weights write one unit.
        """
        return min((s.index.shape[1] for s in self.slices if s.role in ("write", "read")), default=1)

    def role(self, role: str) -> list[Slice]:
        """Returns the slices with this role."""
        return [s for s in self.slices if s.role == role]


@dataclass(frozen=True)
class Length:
    """The length of an axis: `whole`, less `times` for every channel of a layer that goes."""

    whole: int
    times: tuple[tuple[int, int], ...]  # (layer, times)

    def at(self, gone: Sequence[int]) -> int:
        """Returns the length when layer i has lost `gone[i]` channels."""
        return self.whole - sum(times * gone[layer] for layer, times in self.times)


@dataclass(frozen=True)
class SizedNumber:
    """A number in a module's forward code that must be `length`, or count it as many times as it did before."""

    module: str
    call: int
    position: int
    was: int
    length: Length
    multiple: bool

    @property
    def place(self) -> tuple[str, int, int]:
        """Module, call and position."""
        return self.module, self.call, self.position

    def right(self, gone: Sequence[int]) -> Number:
        """Returns what it must be when layer i has lost `gone[i]` channels."""
        new = self.length.at(gone)
        return (new, self.length.whole) if self.multiple else new


@dataclass(frozen=True)
class Product:
    """Multiply-adds of one operation: `times` the product of the lengths."""

    times: int
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The removable channels of a model, by layer, and the layers that stay whole with the reason."""

    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, shared ones once
    whole: Mapping[str, str]
    products: tuple[Product, ...] = ()
    examples: int = 1  # in the batch that was traced
    numbers: tuple[SizedNumber, ...] = field(default=())

    def parameters(self, kept: Sequence[int]) -> int:
        """Returns the exact number of parameters when layer i keeps `kept[i]` of its channels."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for layer, keep in zip(self.layers, kept, strict=True):
            for s in layer.slices:
                if s.tensor in sizes:
                    sizes[s.tensor][s.axis] -= (layer.channels - keep) * s.index.shape[1]
        return int(sum(np.prod(size, dtype=np.int64) for size in sizes.values()))

    def macs(self, kept: Sequence[int]) -> int:
        """Returns the multiply-adds for one example when layer i keeps `kept[i]` of its channels.

        Counted are convolutions, linear and recurrent layers, matrix products and attention.
        """
        gone = [layer.channels - keep for layer, keep in zip(self.layers, kept, strict=True)]
        known: dict[int, int] = {}
        total = 0
        for product in self.products:
            count = product.times
            for length in product.lengths:
                if id(length) not in known:
                    known[id(length)] = length.at(gone)
                count *= known[id(length)]
            total += count
        return total // self.examples

    def sizes(self, kept: Sequence[int]) -> Numbers:
        """Returns the numbers in forward code that must be others when layer i keeps `kept[i]` of its channels."""
        gone = [layer.channels - keep for layer, keep in zip(self.layers, kept, strict=True)]
        wanted: Numbers = {}
        for number in self.numbers if any(gone) else ():
            wanted.setdefault(number.module, {}).setdefault(number.call, {})[number.position] = number.right(gone)
        return wanted


def kept_indices(
    model: nn.Module, graph: ChannelGraph, gone: Sequence[Tensor]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Returns what stays, tensor name -> axis -> indices, when layer i loses the channels `gone[i]`."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    sizes = {name: tensor.shape for name, tensor in named}
    stays: dict[str, dict[int, Tensor]] = {}
    for layer, channels in zip(graph.layers, gone, strict=True):
        for s in layer.slices if len(channels) else ():
            axes = stays.setdefault(s.tensor, {})
            line = axes.setdefault(s.axis, torch.ones(sizes[s.tensor][s.axis], dtype=torch.bool))
            line[s.index[channels].flatten()] = False
    return {t: {a: tuple(m.nonzero().flatten().tolist()) for a, m in axes.items()} for t, axes in stays.items()}


def inputs(example: Example) -> tuple[Tensor, ...]:
    """Returns the example as a tuple of arguments."""
    return (example,) if isinstance(example, Tensor) else tuple(example)


def export(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Captures `model` in evaluation mode as it runs on `arguments`; it is left in its mode.

    Raises:
        ModelError: if `torch.export` cannot, naming the module whose code it met last.
    """
    modes = {m: m.training for m in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path is one operation without channels
        return torch.export.export(model.eval(), arguments, strict=False)
    except Exception as error:  # torch.export raises whatever the user's code meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model cannot be captured by torch.export ({reason}){_where(model, error)}; "
            "remove data-dependent control flow from forward, or check the example input"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode


def _where(model: nn.Module, error: BaseException | None) -> str:
    """Names the module in whose code the error arose: the innermost one in its traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    while error is not None and found is None:
        trace = error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            found = names.get(id(owner), found) if isinstance(owner, nn.Module) else found
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    return "" if found is None else f" in the forward of '{found or type(model).__name__}'"
