"""From ids to groups of channels: which ids touch the same tensors along the same axes, and what every axis becomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedpress.compress.prune.graph import (
    ChannelGraph,
    ChannelGroup,
    Length,
    MacTerm,
    NumberSite,
    SizedNumber,
    Slice,
    WrittenIndex,
)
from fedpress.compress.prune.ids import Call, Ids, Ints
from fedpress.compress.prune.walk import Owner


@dataclass(frozen=True)
class Grouping:
    """The classes of ids that can be pruned, in groups.

    Attributes:
        groups: of channels.
        group_of: [ids], for the label of each class its group, -1 where it is kept.
        channel_of: [ids], which channel of the group it is.
    """

    groups: tuple[ChannelGroup, ...]
    group_of: Ints
    channel_of: Ints

    def length(self, labels: Ints) -> Length:
        """Returns the length of an axis whose indices have these labels."""
        owner = self.group_of[labels]
        which, count = np.unique(owner[owner >= 0], return_counts=True)
        times = []
        for group, indices in zip(which, count, strict=True):
            times.append((int(group), int(indices) // self.groups[group].channels))
        return Length(len(labels), tuple(times))


def channel_graph(
    ids: Ids,
    owners: Sequence[Owner],
    shapes: Mapping[str, tuple[int, ...]],
    example: Sequence[Tensor],
) -> ChannelGraph:
    """Groups classes of ids by the tensors and axes that they touch, and says what every axis becomes.

    Args:
        ids: what the walk has found.
        owners: the ids of each axis of each tensor.
        shapes: of every parameter.
        example: the inputs that were traced.
    """
    labels = ids.labels()
    known = {id(axis) for _, _, axis in owners}
    counted = {id(axis): axis for product in ids.products for axis in product.axes}
    counted |= {id(sized.axis): sized.axis for sized in ids.sized}
    # An axis of no tensor is only counted, but its channels must be known all the same.
    unowned: list[Owner] = [("", 0, axis) for key, axis in counted.items() if key not in known]
    grouping = _grouping(ids, labels, [*owners, *unowned])
    lengths = {key: grouping.length(labels[axis]) for key, axis in counted.items()}
    examples = next((x.shape[0] for x in example if x.dim()), 1)
    return ChannelGraph(
        groups=grouping.groups,
        shapes=shapes,
        unprunable=_unprunable(ids, labels),
        products=_mac_terms(ids, lengths, examples),
        examples=examples,
        numbers=_sized_numbers(ids, lengths),
        indices=_written_indices(ids, labels, grouping),
    )


def _mac_terms(ids: Ids, lengths: Mapping[int, Length], examples: int) -> tuple[MacTerm, ...]:
    terms = []
    for i, product in enumerate(ids.products):
        # What no input has a part in is computed once, but costs are told for one example of the batch.
        times = product.times * (examples if i in ids.without_input else 1)
        terms.append(MacTerm(times, tuple(lengths[id(axis)] for axis in product.axes)))
    return tuple(terms)


def _sized_numbers(ids: Ids, lengths: Mapping[int, Length]) -> tuple[SizedNumber, ...]:
    found = []
    for sized in ids.sized:
        number = sized.call.numbers[sized.position]
        if number != -1 and len(sized.axis):  # -1 is "what is left", which follows by itself
            site = _site(sized.call, sized.position)
            found.append(SizedNumber(site, number, lengths[id(sized.axis)], sized.multiple))
    return tuple(found)


def _written_indices(ids: Ids, labels: Ints, grouping: Grouping) -> tuple[WrittenIndex, ...]:
    found = []
    for written in ids.written:
        own = labels[written.axis]
        site = _site(written.call, -1)
        group, channel = grouping.group_of[own], grouping.channel_of[own]
        found.append(WrittenIndex(site, written.dim, written.places, group, channel))
    return tuple(found)


def _site(call: Call, position: int) -> NumberSite:
    return NumberSite(call.module, call.place, call.turn, position)


def _kept_classes(ids: Ids, labels: Ints) -> dict[int, str]:
    """Returns the classes that cannot be pruned, with the first reason for each."""
    kept: dict[int, str] = {}
    for axis, why in ids.kept:
        for label in np.unique(labels[axis]).tolist():
            kept.setdefault(label, why)
    return kept


def _written_classes(ids: Ids, labels: Ints) -> Iterator[tuple[int, str]]:
    """Yields every class whose channels weights compute, with the module that holds them."""
    for axis, role, module in ids.roles:
        if role == "write":
            for label in np.unique(labels[axis]).tolist():
                yield label, module


def _unprunable(ids: Ids, labels: Ints) -> dict[str, str]:
    """Returns the modules that compute channels of which some are kept, and why."""
    kept = _kept_classes(ids, labels)
    found: dict[str, str] = {}
    written = set()
    for label, module in _written_classes(ids, labels):
        written.add(label)
        if label in kept:
            found.setdefault(module, kept[label])
    for module, why, axes in ids.without_rule:
        if any(written.intersection(labels[axis].tolist()) for axis in axes):
            found.setdefault(module or "the model itself", why)
    return found


def _grouping(ids: Ids, labels: Ints, owners: Sequence[Owner]) -> Grouping:
    """Puts the classes that can be pruned into groups: one for all that touch the same axes of the same tensors."""
    kept = _kept_classes(ids, labels)
    names: dict[int, str] = {}  # class -> the first module that writes it
    for label, module in _written_classes(ids, labels):
        names.setdefault(label, module)
    members: dict[int, list[tuple[int, int]]] = {n: [] for n in names if n not in kept}
    for owner, (_, _, axis) in enumerate(owners):
        for index, label in enumerate(labels[axis].tolist()):
            if label in members:
                members[label].append((owner, index))
    classes_of: dict[tuple[int, ...], list[int]] = {}
    for label, touched in members.items():
        classes_of.setdefault(tuple(owner for owner, _ in touched), []).append(label)
    roles = {int(i): role for axis, role, _ in ids.roles for i in axis[:1]}
    uses: Counter[str] = Counter()
    groups: list[ChannelGroup] = []
    group_of = np.full(ids.count, -1, dtype=np.int64)
    channel_of = np.full(ids.count, -1, dtype=np.int64)
    for touched_owners, classes in classes_of.items():
        table = np.array([[i for _, i in members[label]] for label in classes], dtype=np.int64)
        # Channel 0 is the one that comes first in the first tensor.
        order = np.argsort(table[:, 0], kind="stable")
        group_of[classes] = len(groups)
        channel_of[np.array(classes)[order]] = np.arange(len(classes))
        name = names[classes[0]]
        uses[name] += 1
        slices = tuple(_slices(touched_owners, table[order], owners, roles))
        groups.append(ChannelGroup(name if uses[name] == 1 else f"{name}#{uses[name]}", slices))
    return Grouping(tuple(groups), group_of, channel_of)


def _slices(
    touched: tuple[int, ...], table: Ints, owners: Sequence[Owner], roles: Mapping[int, str]
) -> Iterator[Slice]:
    """Yields what a group does with each axis that it touches; `table` holds [channels, indices]."""
    columns = np.array(touched)
    for owner in dict.fromkeys(touched):
        tensor, axis, own = owners[owner]
        if tensor:
            index = torch.from_numpy(table[:, columns == owner].copy())
            yield Slice(tensor, axis, roles.get(int(own[0]), "follow"), index)
