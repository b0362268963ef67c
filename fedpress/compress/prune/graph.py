"""The channels of a model that can be pruned, and what goes with each: parameters, sizes in code, multiply-adds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.ids import Ints
from fedpress.errors import ModelError
from fedpress.nn.forward_sizes import Number, Numbers


@dataclass(frozen=True)
class Slice:
    """Indices [channels, repeats] along one axis of a parameter or buffer, and what the tensor does with them."""

    tensor: str
    axis: int
    role: str  # "write" (weights that compute the channel), "read" (weights that sum over it), "scale", "follow"
    index: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that touch the same tensors along the same axes, for instance the residual stream of a stage."""

    name: str
    slices: tuple[Slice, ...]

    @property
    def channels(self) -> int:
        """Number of channels that can be pruned."""
        return len(self.slices[0].index)

    @property
    def unit(self) -> int:
        """Width that goes with one channel: 1, or more where channels are tied (groups, heads).

        What reads the channel tells it: of a recurrent or gated layer several rows of weights write one unit.
        """
        widths = (s.index.shape[1] for s in self.slices if s.role in ("write", "read"))
        return min(widths, default=1)

    def role(self, role: str) -> list[Slice]:
        """Returns the slices with this role."""
        return [s for s in self.slices if s.role == role]


@dataclass(frozen=True)
class Length:
    """The length of an axis: `full`, less `times` for every channel of a group that is pruned."""

    full: int
    times: tuple[tuple[int, int], ...]  # (group, times)

    def without(self, pruned: Sequence[int]) -> int:
        """Returns the length when group i has lost `pruned[i]` channels."""
        return self.full - sum(times * pruned[group] for group, times in self.times)


@dataclass(frozen=True)
class NumberSite:
    """A position in a call in a module's forward code (see `fedpress.nn.forward_sizes.Numbers`)."""

    module: str
    place: str
    turn: int  # 0 for the first call at this place in one forward, 1 for the second
    position: int

    @property
    def call(self) -> str:
        """The call as `fedpress.nn.forward_sizes` names it."""
        return f"{self.place}#{self.turn}"


@dataclass(frozen=True)
class SizedNumber:
    """A number in forward code that must be `length`, or count it as many times as it did before."""

    site: NumberSite
    was: int
    length: Length
    multiple: bool

    def correction(self, pruned: Sequence[int]) -> Number:
        """Returns what stands for it in the model's corrections when group i has lost `pruned[i]` channels."""
        new = self.length.without(pruned)
        return (new, self.length.full) if self.multiple else new

    def corrected(self, pruned: Sequence[int]) -> int:
        """Returns the number itself, in place of the one that it was when the model was traced."""
        new = self.length.without(pruned)
        return self.was * new // self.length.full if self.multiple else new


@dataclass(frozen=True)
class WrittenIndex:
    """Indices in forward code that name, along their dimension `dim`, to which places of an axis a call writes."""

    site: NumberSite
    dim: int
    places: Ints
    group: Ints  # of each index of the axis, -1 where it is kept
    channel: Ints  # in that group

    def correction(self, pruned: Sequence[Tensor]) -> Number:
        """Returns what they must be when group i loses the channels `pruned[i]`."""
        kept = np.ones(len(self.group), dtype=bool)
        for i, channels in enumerate(pruned):
            kept &= ~((self.group == i) & np.isin(self.channel, channels.cpu().numpy()))
        new = np.cumsum(kept) - 1
        return ("index", self.dim, tuple(new[self.places[kept[self.places]]].tolist()))


@dataclass(frozen=True)
class MacTerm:
    """Multiply-adds of one operation: `times` the product of the lengths."""

    times: int
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The channels of a model that can be pruned, by group.

    Attributes:
        groups: of channels.
        shapes: of every parameter, shared ones once.
        unprunable: modules whose channels are all kept, and why.
        products: multiply-adds of the operations.
        examples: in the batch that was traced.
        numbers: sizes in forward code that depend on channels.
        approximate: modules with norms over channels that may be cut through.
        indices: tensors of indices in forward code that depend on channels.
        turns: how many calls one forward of a module makes at each place, (module, place) -> calls.
    """

    groups: tuple[ChannelGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    unprunable: Mapping[str, str]
    products: tuple[MacTerm, ...] = ()
    examples: int = 1
    numbers: tuple[SizedNumber, ...] = ()
    approximate: tuple[str, ...] = ()
    indices: tuple[WrittenIndex, ...] = ()
    turns: Mapping[tuple[str, str], int] = field(default_factory=dict)

    def parameters(self, kept: Sequence[int]) -> int:
        """Returns the exact number of parameters when group i keeps `kept[i]` of its channels."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for group, keep in zip(self.groups, kept, strict=True):
            for s in group.slices:
                if s.tensor in sizes:
                    sizes[s.tensor][s.axis] -= (group.channels - keep) * s.index.shape[1]
        return int(sum(np.prod(size, dtype=np.int64) for size in sizes.values()))

    def macs(self, kept: Sequence[int]) -> int:
        """Returns the multiply-adds for one example when group i keeps `kept[i]` of its channels.

        Counted are convolutions, linear and recurrent layers, matrix products and attention.
        """
        pruned = [group.channels - keep for group, keep in zip(self.groups, kept, strict=True)]
        known: dict[int, int] = {}  # many products share a length
        total = 0
        for product in self.products:
            count = product.times
            for length in product.lengths:
                if id(length) not in known:
                    known[id(length)] = length.without(pruned)
                count *= known[id(length)]
            total += count
        return total // self.examples

    def sizes(self, pruned: Sequence[Tensor], *, exactly: bool = False) -> Numbers:
        """Returns the numbers in forward code that must be others when group i loses the channels `pruned[i]`.

        Args:
            pruned: channels of each group.
            exactly: no multiples, but the numbers themselves, which hold for the batch that was traced.
        """
        counts = [len(channels) for channels in pruned]
        rows: dict[tuple[str, str], dict[int, dict[int, Number]]] = {}

        def add(site: NumberSite, number: Number) -> None:
            turns = rows.setdefault((site.module, site.place), {})
            turns.setdefault(site.turn, {})[site.position] = number

        if any(counts):
            for each in self.numbers:
                add(each.site, each.corrected(counts) if exactly else each.correction(counts))
            for indices in self.indices:
                add(indices.site, indices.correction(pruned))
        found: Numbers = {}
        for (module, place), turns in rows.items():
            found.setdefault(module, {}).update(self._calls(module, place, turns))
        return found

    def _calls(
        self, module: str, place: str, turns: Mapping[int, dict[int, Number]]
    ) -> dict[str, dict[int, Number]]:
        """Names the calls at a place: together where all need the same, else each by its turn."""
        first = next(iter(turns.values()))
        # Together they hold also for a loop that runs more often another time.
        if len(turns) == self.turns[module, place] and all(
            numbers == first for numbers in turns.values()
        ):
            return {place: first}
        return {f"{place}#{turn}": numbers for turn, numbers in turns.items()}


def kept_indices(
    model: nn.Module, graph: ChannelGraph, pruned: Sequence[Tensor]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Returns what is kept, tensor name -> axis -> indices, when group i loses the channels `pruned[i]`."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    sizes = {name: tensor.shape for name, tensor in named}
    masks: dict[str, dict[int, Tensor]] = {}
    for group, channels in zip(graph.groups, pruned, strict=True):
        for s in group.slices if len(channels) else ():
            axes = masks.setdefault(s.tensor, {})
            mask = axes.setdefault(s.axis, torch.ones(sizes[s.tensor][s.axis], dtype=torch.bool))
            mask[s.index[channels].flatten()] = False
    return {
        name: {axis: tuple(mask.nonzero().flatten().tolist()) for axis, mask in axes.items()}
        for name, axes in masks.items()
    }


def export(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Captures `model` in evaluation mode as it runs on `arguments`; it is left in its mode.

    Raises:
        ModelError: if `torch.export` cannot, naming the module whose code it met last.
    """
    modes = {m: m.training for m in model.modules()}
    held = [(m, _attributes(m)) for m in model.modules()]
    hook = model.register_forward_hook(lambda module, given, output: tensors_in(output))
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(
            False
        )  # the fast path is one operation without channels
        return torch.export.export(model.eval(), arguments, strict=False)
    except Exception as error:  # torch.export raises whatever the user's code meets
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model cannot be captured by torch.export ({reason}){_where(model, error)}",
            place="model",
            cure="remove data-dependent control flow from forward, or check the example input",
        ) from error
    finally:
        hook.remove()
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        for module, attributes in held:
            _put_back_(module, attributes)


def tensors_in(output: object) -> list[Tensor]:
    """Returns the tensors in what a model gives: in containers, and in objects that torch does not know.

    >>> tensors_in({"a": torch.ones(1), "b": [torch.zeros(2), "words"]})
    [tensor([1.]), tensor([0., 0.])]
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def search(value: object) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
            elif (
                id(leaf) not in seen
                and not isinstance(leaf, nn.Module | type)
                and hasattr(leaf, "__dict__")
            ):
                seen.add(id(leaf))
                search(list(vars(leaf).values()))

    search(output)
    return found


CONTAINERS = (
    list,
    dict,
    OrderedDict,
    set,
)  # hooks are in ordered dictionaries; forward may register some
REGISTERED = ("training", "_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns a module's plain attributes, its hooks too, and what is in those that are containers."""
    plain = {key: value for key, value in module.__dict__.items() if key not in REGISTERED}
    return {
        key: (value, copy(value) if type(value) in CONTAINERS else None)
        for key, value in plain.items()
    }


def _put_back_(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    """Undoes what forward kept in attributes while it was captured: tensors without values, of which no copy runs."""
    for key in [key for key in module.__dict__ if key not in attributes and key not in REGISTERED]:
        del module.__dict__[key]
    for key, (value, inside) in attributes.items():
        module.__dict__[key] = value
        if isinstance(inside, list):
            value[:] = inside
        elif inside is not None:
            value.clear()
            value.update(inside)


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
