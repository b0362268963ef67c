"""Describes a model's prunable channels, and the tensors, sizes and costs that depend on them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import config as fx_config
from torch.utils._pytree import tree_leaves

from fedpress.compress.prune.ids import Ints
from fedpress.errors import ModelError
from fedpress.nn.forward_sizes import Number, Numbers


@dataclass(frozen=True)
class ChannelSlice:
    """The indices of a group's channels on one axis of a parameter or buffer.

    Example: channel 3 of `conv1` with 16 channels is row 3 of `conv1.weight` (axis 0, "write") and
    column 3 of `conv2.weight` (axis 1, "read").

    Attributes:
        tensor: name of the parameter or buffer.
        axis: the axis of the tensor that holds the channels.
        role: "write" for weights that compute the channel, "read" for weights that sum over it,
            "scale" for a factor per channel, "follow" for anything else, such as a bias.
        index: [channels, repeats], the indices on the axis that belong to each channel.
    """

    tensor: str
    axis: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that occur on the same axes of the same tensors, such as a residual stream.

    `name` is the name of the first module that computes them.
    """

    name: str
    slices: tuple[ChannelSlice, ...]

    @property
    def channels(self) -> int:
        """Number of channels that can be pruned."""
        return len(self.slices[0].index)

    @property
    def unit(self) -> int:
        """Number of indices that one channel takes: 1, or 64 for an attention head of width 64.

        If weights differ, the smallest number counts: a hidden unit of an LSTM is written by four
        rows, but read as one column.
        """
        widths = []
        for s in self.slices:
            if s.role in ("write", "read"):
                widths.append(s.index.shape[1])
        return min(widths, default=1)

    def slices_with_role(self, role: str) -> list[ChannelSlice]:
        """Returns the slices with this role."""
        return [s for s in self.slices if s.role == role]


@dataclass(frozen=True)
class Length:
    """The length of an axis as a function of the number of pruned channels.

    Attributes:
        full: length before pruning.
        indices_per_channel: pairs (group, indices on this axis that each of its channels takes).
    """

    full: int
    indices_per_channel: tuple[tuple[int, int], ...]

    def without(self, pruned: Sequence[int]) -> int:
        """Returns the length of the axis when group i has lost `pruned[i]` channels.

        >>> Length(64, ((0, 8),)).without([3])  # 8 heads of width 8, of which 3 are pruned
        40
        """
        length = self.full
        for group, indices in self.indices_per_channel:
            length -= indices * pruned[group]
        return length


@dataclass(frozen=True)
class NumberSite:
    """Identifies one number in forward code, such as the 8 in `x.view(n, 4, 8)`.

    Attributes:
        module: name of the module whose forward makes the call.
        place: file, line and column of the call (see `fedpress.nn.forward_sizes.Numbers`).
        occurrence: 0 for the first call at this place in one forward, 1 for the second.
        position: position among the numbers of the call; 2 for the 8 above.
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
        site: the call and position of the number.
        traced_value: the number when the model was traced.
        length: length of the axis.
        multiple: whether the number is in proportion to the length, as `n * heads` is.
    """

    site: NumberSite
    traced_value: int
    length: Length
    multiple: bool

    def correction(self, pruned: Sequence[int]) -> Number:
        """Returns the correction to store in a plan, when group i has lost `pruned[i]` channels.

        The correction is the new number. But for a multiple it is the pair (new length, old
        length), because the other factor (often the batch size) may change from call to call.
        """
        new = self.length.without(pruned)
        return (new, self.length.full) if self.multiple else new

    def corrected(self, pruned: Sequence[int]) -> int:
        """Returns the new number for the batch that was traced."""
        new = self.length.without(pruned)
        return self.traced_value * new // self.length.full if self.multiple else new


@dataclass(frozen=True)
class WrittenIndex:
    """A tensor of indices in forward code, such as `index` in `x[:, index] = y`.

    It selects indices of one axis of another tensor, here axis 1 of x. When channels of this axis
    are pruned, the indices are renumbered.

    Attributes:
        site: the call.
        dim: the dimension of the tensor of indices along which the indices differ.
        places: the indices along `dim`.
        group: [size of the axis], the group of each index of the axis; -1 if it cannot be pruned.
        channel: [size of the axis], the channel of each index within its group; -1 if the index
            cannot be pruned.
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
    """Multiply-adds of one operation: `factor` times the product of the lengths.

    Example: a linear layer on 2 examples costs 2 * inputs * outputs.
    """

    factor: int
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class ChannelGraph:
    """The prunable channels of a model in groups, and the sizes and costs that depend on them.

    `trace` makes this object; it does not change when the model is pruned.

    Attributes:
        groups: groups of channels; each can be pruned to its own width.
        shapes: shape of every parameter, shared ones once.
        unprunable: name of each module that has channels which cannot be pruned -> the reason.
        mac_terms: multiply-adds of the operations.
        examples: number of examples in the batch that was traced.
        sized_numbers: sizes in forward code that depend on channels.
        approximate: modules whose norms average over prunable channels, so that pruning changes
            their statistics.
        written_indices: tensors of indices in forward code that depend on channels.
        call_counts: (module, place in its code) -> number of calls that one forward of the module
            makes at this place.
    """

    groups: tuple[ChannelGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    unprunable: Mapping[str, str]
    mac_terms: tuple[MacTerm, ...] = ()
    examples: int = 1
    sized_numbers: tuple[SizedNumber, ...] = ()
    approximate: tuple[str, ...] = ()
    written_indices: tuple[WrittenIndex, ...] = ()
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

        They are counted for convolutions, linear and recurrent layers, matrix products and
        attention.
        """
        pruned = []
        for group, keep in zip(self.groups, kept, strict=True):
            pruned.append(group.channels - keep)
        # The search for widths calls this thousands of times, and many products share a length: so
        # each length is computed once.
        known: dict[int, int] = {}
        total = 0
        for product in self.mac_terms:
            # All counts are integers, since a float could not hold those of large networks exactly.
            count = product.factor
            for length in product.lengths:
                if id(length) not in known:
                    known[id(length)] = length.without(pruned)
                count *= known[id(length)]
            total += count
        # The multiply-adds were counted for the whole traced batch.
        return total // self.examples

    def corrections(self, pruned: Sequence[Tensor], *, for_traced_batch: bool = False) -> Numbers:
        """Returns the corrections of numbers in forward code when group i loses `pruned[i]`.

        Args:
            pruned: indices of the pruned channels of each group.
            for_traced_batch: whether multiples such as `n * heads` are returned as plain numbers,
                which are right only for the batch size that was traced.
        """
        counts = [len(channels) for channels in pruned]
        if not any(counts):
            return {}
        corrections: list[tuple[NumberSite, Number]] = []
        for number in self.sized_numbers:
            new = number.corrected(counts) if for_traced_batch else number.correction(counts)
            corrections.append((number.site, new))
        for indices in self.written_indices:
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
        """Names the calls at one place.

        If all calls need the same numbers, they share one entry, else each call has its own.
        """
        first = next(iter(occurrences.values()))
        # A shared entry is right also if a loop runs more often for another input.
        is_complete = len(occurrences) == self.call_counts[module, place]
        if is_complete and all(numbers == first for numbers in occurrences.values()):
            return {place: first}
        return {f"{place}#{occurrence}": numbers for occurrence, numbers in occurrences.items()}


def kept_indices(
    model: nn.Module, graph: ChannelGraph, pruned: Sequence[Tensor]
) -> dict[str, dict[int, tuple[int, ...]]]:
    """Returns tensor name -> axis -> kept indices, when group i loses the channels `pruned[i]`.

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
            key = s.tensor, s.axis
            if key not in masks:
                masks[key] = torch.ones(shapes[s.tensor][s.axis], dtype=torch.bool)
            # A tensor may lose channels of several groups along one axis, for instance after `cat`.
            masks[key][s.index[channels].flatten()] = False

    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, axis), mask in masks.items():
        kept.setdefault(name, {})[axis] = tuple(mask.nonzero().flatten().tolist())
    return kept


def capture(model: nn.Module, arguments: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """Captures the graph of `model` by `torch.export`, in evaluation mode on `arguments`.

    The model's modes and attributes are restored.

    Raises:
        ModelError: if `torch.export` cannot capture the model; the message names the module that
            failed.
    """
    modes = {module: module.training for module in model.modules()}
    attributes = [(module, _attributes(module)) for module in model.modules()]
    # `torch.export` accepts outputs in few kinds of containers, so the hook takes the tensors out
    # of any object.
    hook = model.register_forward_hook(lambda module, given, output: tensors_in(output))

    had_fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of attention is one operation, so the graph would not show the heads.
        torch.backends.mha.set_fastpath_enabled(False)
        with _without_stack_traces():
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


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Keeps torch from storing a stack trace with each node, a tenth of a capture."""
    # Versions before 2.13 may lack the switch.
    before = getattr(fx_config, "do_not_emit_stack_traces", None)
    if before is None:
        yield
        return
    fx_config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx_config.do_not_emit_stack_traces = before


def tensors_in(output: object) -> list[Tensor]:
    """Returns the tensors in a model's output, also those in containers and in objects' attributes.

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
"""Attributes that torch manages itself; `capture` restores the mode separately."""


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
