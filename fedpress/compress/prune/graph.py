"""The prunable channels of a model, and the tensors, sizes and costs that depend on them."""

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
    """Where the channels of a group lie on one axis of a parameter or buffer.

    Attributes:
        tensor: its name.
        axis: of the tensor.
        role: "write" for weights that compute the channel, "read" for weights that sum over it,
            "scale" for a factor per channel, "follow" for anything else, such as a bias.
        index: [channels, repeats], the places of each channel.
    """

    tensor: str
    axis: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that touch the same tensors along the same axes, such as a residual stream."""

    name: str
    slices: tuple[Slice, ...]

    @property
    def channels(self) -> int:
        """Number of channels that can be pruned."""
        return len(self.slices[0].index)

    @property
    def unit(self) -> int:
        """Width of one channel: 1, or more where several indices are united (groups, heads).

        It is the smallest over the weights that write or read it: a hidden unit of an LSTM is
        written by four rows, but read as one column.
        """
        widths = (s.index.shape[1] for s in self.slices if s.role in ("write", "read"))
        return min(widths, default=1)

    def role(self, role: str) -> list[Slice]:
        """Returns the slices with this role."""
        return [s for s in self.slices if s.role == role]


@dataclass(frozen=True)
class Length:
    """The length of an axis: `full`, less some indices for every channel that is pruned."""

    full: int
    times: tuple[tuple[int, int], ...]  # (group, indices that each of its channels takes)

    def without(self, pruned: Sequence[int]) -> int:
        """Returns the length when group i has lost `pruned[i]` channels."""
        return self.full - sum(times * pruned[group] for group, times in self.times)


@dataclass(frozen=True)
class NumberSite:
    """A position in a call in a module's forward code (see `fedpress.nn.forward_sizes.Numbers`).

    Attributes:
        module: whose forward makes the call.
        place: where the call stands.
        occurrence: 0 for the first call at this place in one forward, 1 for the second.
        position: among the numbers of the call.
    """

    module: str
    place: str
    occurrence: int
    position: int

    @property
    def call(self) -> str:
        """Name of the call, as in `fedpress.nn.forward_sizes`."""
        return f"{self.place}#{self.occurrence}"


@dataclass(frozen=True)
class SizedNumber:
    """A number in forward code that is the length of an axis, or a multiple of it.

    Attributes:
        site: where it stands.
        was: the number when the model was traced.
        length: of the axis.
        multiple: whether the number is in proportion to the length, as `n * heads` is.
    """

    site: NumberSite
    was: int
    length: Length
    multiple: bool

    def correction(self, pruned: Sequence[int]) -> Number:
        """Returns what a pruning plan stores for it, when group i has lost `pruned[i]` channels.

        A multiple is corrected by a pair (new length, old length), because the other factor, the
        number of examples say, may change from call to call.
        """
        new = self.length.without(pruned)
        return (new, self.length.full) if self.multiple else new

    def corrected(self, pruned: Sequence[int]) -> int:
        """Returns the corrected number itself, for the batch that was traced."""
        new = self.length.without(pruned)
        return self.was * new // self.length.full if self.multiple else new


@dataclass(frozen=True)
class WrittenIndex:
    """A tensor of indices in forward code that says to which places of an axis a call writes.

    Attributes:
        site: the call.
        dim: the dimension of the indices along which they name places.
        places: the indices along it.
        group: [size of the axis], the group of each index of the axis; -1 if it is kept.
        channel: [size of the axis], which channel of that group it is.
    """

    site: NumberSite
    dim: int
    places: Ints
    group: Ints
    channel: Ints

    def correction(self, pruned: Sequence[Tensor]) -> Number:
        """Returns the renumbered indices when group i loses the channels `pruned[i]`."""
        kept = np.ones(len(self.group), dtype=bool)
        for i, channels in enumerate(pruned):
            is_pruned = (self.group == i) & np.isin(self.channel, channels.cpu().numpy())
            kept &= ~is_pruned
        new_index = np.cumsum(kept) - 1
        kept_places = self.places[kept[self.places]]
        return ("index", self.dim, tuple(new_index[kept_places].tolist()))


@dataclass(frozen=True)
class MacTerm:
    """Multiply-adds of one operation: `factor` times the product of the lengths."""

    factor: int
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The channels of a model that can be pruned, by group.

    Attributes:
        groups: of channels.
        shapes: of every parameter, shared ones once.
        unprunable: modules some of whose channels are kept, and why.
        products: multiply-adds of the operations.
        examples: number of examples in the batch that was traced.
        numbers: sizes in forward code that depend on channels.
        approximate: modules with norms that average over channels which may be pruned.
        indices: tensors of indices in forward code that depend on channels.
        call_counts: how many calls one forward of a module makes at each place, (module, place) ->
            calls.
    """

    groups: tuple[ChannelGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    unprunable: Mapping[str, str]
    products: tuple[MacTerm, ...] = ()
    examples: int = 1
    numbers: tuple[SizedNumber, ...] = ()
    approximate: tuple[str, ...] = ()
    indices: tuple[WrittenIndex, ...] = ()
    call_counts: Mapping[tuple[str, str], int] = field(default_factory=dict)

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
        pruned = []
        for group, keep in zip(self.groups, kept, strict=True):
            pruned.append(group.channels - keep)
        # Many products share a length, so each is computed once; this runs in the search for
        # widths.
        known: dict[int, int] = {}
        total = 0
        for product in self.products:
            # All counts are integers, since a float could not hold those of large networks exactly.
            count = product.factor
            for length in product.lengths:
                if id(length) not in known:
                    known[id(length)] = length.without(pruned)
                count *= known[id(length)]
            total += count
        # Products were counted for the whole batch.
        return total // self.examples

    def sizes(self, pruned: Sequence[Tensor], *, exactly: bool = False) -> Numbers:
        """Returns the corrected numbers in forward code when group i loses `pruned[i]`.

        Args:
            pruned: channels of each group.
            exactly: whether multiples are written as plain numbers, which hold only for the traced
                batch.
        """
        counts = [len(channels) for channels in pruned]
        if not any(counts):
            return {}
        corrections: list[tuple[NumberSite, Number]] = []
        for number in self.numbers:
            new = number.corrected(counts) if exactly else number.correction(counts)
            corrections.append((number.site, new))
        for indices in self.indices:
            corrections.append((indices.site, indices.correction(pruned)))

        by_place: dict[tuple[str, str], dict[int, dict[int, Number]]] = {}
        for site, new in corrections:
            occurrences = by_place.setdefault((site.module, site.place), {})
            occurrences.setdefault(site.occurrence, {})[site.position] = new
        found: Numbers = {}
        for (module, place), occurrences in by_place.items():
            found.setdefault(module, {}).update(self._name_calls(module, place, occurrences))
        return found

    def _name_calls(
        self, module: str, place: str, occurrences: Mapping[int, dict[int, Number]]
    ) -> dict[str, dict[int, Number]]:
        """Names the calls at one place: one entry if all need the same numbers, else several."""
        first = next(iter(occurrences.values()))
        # One entry for all also holds when a loop runs more often for another input.
        is_complete = len(occurrences) == self.call_counts[module, place]
        if is_complete and all(numbers == first for numbers in occurrences.values()):
            return {place: first}
        return {f"{place}#{occurrence}": numbers for occurrence, numbers in occurrences.items()}


def kept_indices(
    model: nn.Module, graph: ChannelGraph, pruned: Sequence[Tensor]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Returns the kept indices, tensor -> axis -> indices, when group i loses `pruned[i]`.

    Tensors that lose nothing are left out.
    """
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    shapes = {name: tensor.shape for name, tensor in named}
    masks: dict[tuple[str, int], Tensor] = {}
    for group, channels in zip(graph.groups, pruned, strict=True):
        if not len(channels):
            continue
        for s in group.slices:
            # A tensor may lose channels of several groups along one axis.
            whole = torch.ones(shapes[s.tensor][s.axis], dtype=torch.bool)
            mask = masks.setdefault((s.tensor, s.axis), whole)
            mask[s.index[channels].flatten()] = False

    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), mask in masks.items():
        kept.setdefault(name, {})[axis] = tuple(mask.nonzero().flatten().tolist())
    return kept


def capture(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Captures `model` in evaluation mode on `arguments`; modes and attributes are restored.

    Raises:
        ModelError: if `torch.export` cannot capture it; the message names the module that failed.
    """
    modes = {module: module.training for module in model.modules()}
    attributes = [(module, _attributes(module)) for module in model.modules()]
    # `torch.export` accepts outputs in few kinds of containers, so the hook takes the tensors out
    # of any object.
    hook = model.register_forward_hook(lambda module, given, output: tensors_in(output))

    had_fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of attention is a single operation in which no heads can be seen.
        torch.backends.mha.set_fastpath_enabled(False)
        return torch.export.export(model.eval(), arguments, strict=False)
    except Exception as error:  # torch.export raises whatever the user's code raises
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"the model cannot be captured by torch.export ({reason})"
            f"{_failing_module(model, error)}",
            place="model",
            cure="remove data-dependent control flow from forward, or check the example input",
        ) from error
    finally:
        hook.remove()
        torch.backends.mha.set_fastpath_enabled(had_fast_path)
        for module, mode in modes.items():
            module.training = mode
        for module, before in attributes:
            _restore_attributes_(module, before)


def tensors_in(output: object) -> list[Tensor]:
    """Returns the tensors in a model's output: in containers and attributes of objects.

    >>> tensors_in({"a": torch.ones(1), "b": [torch.zeros(2), "words"]})
    [tensor([1.]), tensor([0., 0.])]
    """
    found: list[Tensor] = []
    seen: set[int] = set()

    def search(value: object) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                found.append(leaf)
                continue
            # Objects may refer to each other, so each is searched once. An output that refers to
            # the model itself must not make its weights outputs.
            has_attributes = hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type)
            if has_attributes and id(leaf) not in seen:
                seen.add(id(leaf))
                search(list(vars(leaf).values()))

    search(output)
    return found


CONTAINERS = (list, dict, OrderedDict, set)
"""Attributes of these types are copied; ordered dictionaries hold hooks that forward may add."""
REGISTERED = ("training", "_parameters", "_buffers", "_modules")


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns a module's plain attributes and hooks, each with a copy if it is a container."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in module.__dict__.items():
        if key not in REGISTERED:
            found[key] = (value, copy(value) if type(value) in CONTAINERS else None)
    return found


def _restore_attributes_(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    """Restores the attributes that forward changed while it was captured.

    Forward may have cached tensors of the capture, which have no values: every later run would fail
    with them.
    """
    new = [key for key in module.__dict__ if key not in attributes and key not in REGISTERED]
    for key in new:
        del module.__dict__[key]
    for key, (value, content) in attributes.items():
        module.__dict__[key] = value
        if isinstance(content, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)


def _failing_module(model: nn.Module, error: BaseException | None) -> str:
    """Names the module in whose code the error arose: the innermost one in its traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found = None
    # torch wraps errors in others, so the causes are searched too.
    while error is not None and found is None:
        trace = error.__traceback__
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            if isinstance(owner, nn.Module):
                found = names.get(id(owner), found)
            trace = trace.tb_next
        error = error.__cause__ or error.__context__
    if found is None:
        return ""
    return f" in the forward of '{found or type(model).__name__}'"
