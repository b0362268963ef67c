"""Turns the united ids of a traced model into groups of channels: the `ChannelGraph`.

Each index of each axis of a tensor has an id. Ids that must be pruned together are united; they get
the same *label* and form a *class*, which is one channel. Channels that occur on the same axes of
the same tensors form a *group*, such as the 64 channels of a residual stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fedpress.compress.prune.graph import (
    ChannelGraph,
    ChannelGroup,
    ChannelSlice,
    Length,
    MacTerm,
    NumberSite,
    SizedNumber,
    WrittenIndex,
)
from fedpress.compress.prune.ids import ChannelIds, ForwardCall, Ints
from fedpress.compress.prune.walk import TensorAxis


@dataclass(frozen=True)
class Grouping:
    """The groups of channels, and the channel of each label.

    Attributes:
        groups: groups of prunable channels.
        group_of: [ids], the group of each label; -1 if the class cannot be pruned.
        channel_of: [ids], the channel of each label within its group; -1 if the class cannot be
            pruned.
    """

    groups: tuple[ChannelGroup, ...]
    group_of: Ints
    channel_of: Ints

    def length(self, labels: Ints) -> Length:
        """Returns the length of an axis with these labels, as a function of the pruned channels."""
        groups = self.group_of[labels]
        found, counts = np.unique(groups[groups >= 0], return_counts=True)
        times = []
        for group, indices in zip(found, counts, strict=True):
            times.append((int(group), int(indices) // self.groups[group].channels))
        return Length(len(labels), tuple(times))


def channel_graph(
    ids: ChannelIds,
    tensor_axes: Sequence[TensorAxis],
    shapes: Mapping[str, tuple[int, ...]],
    example: Sequence[Tensor],
) -> ChannelGraph:
    """Returns the prunable channels in groups, with the sizes and costs that depend on them.

    Args:
        ids: what was collected from the model's graph: the ids that are united, and those that
            cannot be pruned.
        tensor_axes: the ids of each axis of each tensor.
        shapes: shape of every parameter.
        example: the inputs with which the model was traced.
    """
    labels = ids.labels()
    # Arrays are keyed by `id(axis)`, not by their content: two axes may have the same ids.
    sized_axes: dict[int, Ints] = {}
    for product in ids.products:
        for axis in product.axes:
            sized_axes[id(axis)] = axis
    for size in ids.sizes_in_calls:
        sized_axes[id(size.axis)] = size.axis

    # An activation's axis belongs to no stored tensor, but its length depends on channels too.
    owned = {id(axis) for _, _, axis in tensor_axes}
    unowned: list[TensorAxis] = []
    for key, axis in sized_axes.items():
        if key not in owned:
            unowned.append(("", 0, axis))
    grouping = _grouping(ids, labels, [*tensor_axes, *unowned])
    lengths = {key: grouping.length(labels[axis]) for key, axis in sized_axes.items()}
    examples = next((x.shape[0] for x in example if x.dim()), 1)
    return ChannelGraph(
        groups=grouping.groups,
        shapes=shapes,
        unprunable=_unprunable(ids, labels),
        mac_terms=_mac_terms(ids, lengths, examples),
        examples=examples,
        sized_numbers=_sized_numbers(ids, lengths),
        written_indices=_written_indices(ids, labels, grouping),
    )


def _mac_terms(
    ids: ChannelIds, lengths: Mapping[int, Length], examples: int
) -> tuple[MacTerm, ...]:
    """Returns the multiply-adds of each operation as a function of the lengths of its axes."""
    terms = []
    for i, product in enumerate(ids.products):
        # A product that does not depend on the input is computed once a batch, whatever its size.
        # `ChannelGraph.macs` later divides all costs by the number of examples, so the cost of such
        # a product is multiplied by this number here.
        factor = product.factor * (examples if i in ids.without_input else 1)
        terms.append(MacTerm(factor, tuple(lengths[id(axis)] for axis in product.axes)))
    return tuple(terms)


def _sized_numbers(ids: ChannelIds, lengths: Mapping[int, Length]) -> tuple[SizedNumber, ...]:
    """Returns the numbers in forward code that are lengths of axes."""
    found = []
    for size in ids.sizes_in_calls:
        number = size.call.numbers[size.position]
        # torch computes a size of -1 from the others, so it needs no correction.
        if number != -1 and len(size.axis):
            site = _site(size.call, size.position)
            found.append(SizedNumber(site, number, lengths[id(size.axis)], size.multiple))
    return tuple(found)


def _written_indices(ids: ChannelIds, labels: Ints, grouping: Grouping) -> tuple[WrittenIndex, ...]:
    """Returns the tensors of indices in forward code that say which channels are written."""
    found = []
    for written in ids.indices_in_calls:
        axis_labels = labels[written.axis]
        found.append(
            WrittenIndex(
                site=_site(written.call, -1),
                dim=written.dim,
                places=written.places,
                group=grouping.group_of[axis_labels],
                channel=grouping.channel_of[axis_labels],
            )
        )
    return tuple(found)


def _site(call: ForwardCall, position: int) -> NumberSite:
    return NumberSite(call.module, call.place, call.occurrence, position)


def _kept_classes(ids: ChannelIds, labels: Ints) -> dict[int, str]:
    """Returns the label of each class that cannot be pruned -> the first reason in graph order."""
    # The first reason is nearest to the cause; later ones often only follow from it.
    kept: dict[int, str] = {}
    for axis, why in ids.kept:
        for label in np.unique(labels[axis]).tolist():
            kept.setdefault(label, why)
    return kept


def _written_classes(ids: ChannelIds, labels: Ints) -> Iterator[tuple[int, str]]:
    """Yields the label of every class that is an output channel of a weight, with its module."""
    for axis, role, module in ids.roles:
        if role == "write":
            for label in np.unique(labels[axis]).tolist():
                yield label, module


def _unprunable(ids: ChannelIds, labels: Ints) -> dict[str, str]:
    """Returns the modules with output channels that cannot be pruned, each with a reason."""
    kept = _kept_classes(ids, labels)
    found: dict[str, str] = {}
    written = set()
    for label, module in _written_classes(ids, labels):
        written.add(label)
        if label in kept:
            found.setdefault(module, kept[label])
    # Operations without a rule are reported only if channels reach them.
    for module, why, axes in ids.without_rule:
        if any(written.intersection(labels[axis].tolist()) for axis in axes):
            found.setdefault(module or "the model itself", why)
    return found


def _grouping(ids: ChannelIds, labels: Ints, tensor_axes: Sequence[TensorAxis]) -> Grouping:
    """Groups the prunable classes that occur on the same axes of the same tensors."""
    writers = _first_writers(ids, labels)
    places = _touched_places(ids, labels, tensor_axes, writers)
    # All ids of an axis have the same role, so the role is stored under the first id only.
    roles = {}
    for axis, role, _ in ids.roles:
        if len(axis):
            roles[int(axis[0])] = role
    name_counts: Counter[str] = Counter()
    groups: list[ChannelGroup] = []
    group_of = np.full(ids.count, -1, dtype=np.int64)
    channel_of = np.full(ids.count, -1, dtype=np.int64)
    for group_owners, classes in places.classes_by_owners().items():
        starts = places.starts[classes]
        table = places.indices[starts[:, None] + np.arange(len(group_owners))]  # [channels, places]

        # Channel 0 is the one that comes first in the first tensor.
        order = np.argsort(table[:, 0], kind="stable")
        members = places.labels[classes]
        group_of[members] = len(groups)
        channel_of[members[order]] = np.arange(len(members))

        # One module may compute several groups, for instance the queries and values of attention.
        # Names must be unique, since plans and sensitivities refer to groups by name.
        name = writers[int(members[0])]
        name_counts[name] += 1
        unique_name = name if name_counts[name] == 1 else f"{name}#{name_counts[name]}"
        slices = tuple(_slices(group_owners, table[order], tensor_axes, roles))
        groups.append(ChannelGroup(unique_name, slices))
    return Grouping(tuple(groups), group_of, channel_of)


def _first_writers(ids: ChannelIds, labels: Ints) -> dict[int, str]:
    """Returns for each class the first module that computes it."""
    names: dict[int, str] = {}
    for label, module in _written_classes(ids, labels):
        names.setdefault(label, module)
    return names


@dataclass(frozen=True)
class _Places:
    """Where the prunable classes occur: class c has the entries from starts[c] to starts[c + 1].

    Attributes:
        labels: [classes], the label of each class.
        starts: [classes + 1], positions in the two arrays below.
        owners: [entries], positions in `tensor_axes`.
        indices: [entries], indices on these axes.
    """

    labels: Ints
    starts: Ints
    owners: Ints
    indices: Ints

    def classes_by_owners(self) -> dict[tuple[int, ...], list[int]]:
        """Returns owners -> the classes that occur there, both in order of the classes."""
        # Bytes are hashed much faster than tuples of numbers, and wide networks have many classes.
        found: dict[bytes, list[int]] = {}
        bounds = self.starts.tolist()
        for i, (start, end) in enumerate(pairwise(bounds)):
            found.setdefault(self.owners[start:end].tobytes(), []).append(i)
        by_owners = {}
        for classes in found.values():
            first = classes[0]
            by_owners[tuple(self.owners[bounds[first] : bounds[first + 1]].tolist())] = classes
        return by_owners


def _touched_places(
    ids: ChannelIds, labels: Ints, tensor_axes: Sequence[TensorAxis], writers: Mapping[int, str]
) -> _Places:
    """Returns where each prunable class occurs, with the classes in the order of `writers`."""
    kept = _kept_classes(ids, labels)
    prunable = np.array([label for label in writers if label not in kept], dtype=np.int64)
    class_of = np.full(ids.count, -1, dtype=np.int64)
    class_of[prunable] = np.arange(len(prunable))

    axes = [axis for _, _, axis in tensor_axes]
    sizes = [len(axis) for axis in axes]
    none = np.zeros(0, dtype=np.int64)
    classes = class_of[labels[np.concatenate([none, *axes])]]
    owners = np.repeat(np.arange(len(axes)), sizes)
    indices = np.concatenate([none, *(np.arange(size) for size in sizes)])
    # Stable, so that the entries of each class stay in the order of axes and indices.
    order = np.argsort(classes, kind="stable")
    order = order[np.searchsorted(classes[order], 0) :]  # -1: not prunable
    found, starts = np.unique(classes[order], return_index=True)
    return _Places(
        labels=prunable[found],
        starts=np.append(starts, len(order)),
        owners=owners[order],
        indices=indices[order],
    )


def _slices(
    touched: tuple[int, ...],
    table: Ints,
    tensor_axes: Sequence[TensorAxis],
    roles: Mapping[int, str],
) -> Iterator[ChannelSlice]:
    """Yields a `ChannelSlice` for each axis of a tensor on which the channels of a group occur.

    Args:
        touched: positions in `tensor_axes`, one for each column of `table`.
        table: [channels, columns], the index of each channel on these axes.
        tensor_axes: all tensors with the ids of their axes.
        roles: first id of an axis -> its role.
    """
    columns = np.array(touched)
    for owner in dict.fromkeys(touched):
        tensor, axis, axis_ids = tensor_axes[owner]
        if tensor:
            index = torch.from_numpy(table[:, columns == owner].copy())
            yield ChannelSlice(tensor, axis, roles.get(int(axis_ids[0]), "follow"), index)
