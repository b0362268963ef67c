"""Plans pruning one channel at a time: drops the channel with the lowest score, then scores again.

Removing a channel changes the scores of the layers that read it, so the order differs from that of
one-shot pruning (`plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup
from fedpress.compress.prune.plan import PruningPlan, allowed_widths, check_settings, plan
from fedpress.compress.prune.scores import (
    Losses,
    channel_sums,
    divided_by_mean,
    raw_scores,
)
from fedpress.compress.prune.targets import Target, parameter_target
from fedpress.compress.prune.tensors import tensors_of
from fedpress.core.random_source import Source
from fedpress.errors import RecipeError

BEYOND_TARGET = 0.9
"""Channels are removed down to this share of the target, because rounding widens some layers."""


def prune_single_channel(
    model: nn.Module,
    graph: ChannelGraph,
    score: str = "l1",
    *,
    keep_params: float = 0.30,
    target: Target | None = None,
    round_to: int = 8,
    min_keep: float = 0.1,
    tolerance: float = 0.005,
    exact: bool = False,
    every: int = 64,
    losses: Losses | None = None,
    generator: Source = None,
) -> PruningPlan:
    """Plans the removal of channels one at a time, lowest score first, then rounds the widths.

    The scores "l1" and "l2" are updated after every channel. "random" is drawn once. All other
    scores are computed again only after `every` removals, with the removed channels set to zero,
    because most of these scores need forward and backward passes. All tensors of `model` are
    restored.

    Args:
        model: the traced model.
        graph: its channels.
        score: a key of `fedpress.compress.SCORES`, such as "l1".
        keep_params: share of the parameters to keep, in (0, 1].
        target: used instead of `keep_params` (see `fedpress.compress.prune.targets`).
        round_to: a layer's width becomes a multiple of this, or stays as it is.
        min_keep: smallest share of its channels that a layer keeps.
        tolerance: largest difference between the wanted and the reached cost that needs no note in
            the plan, as a share of the whole network's cost.
        exact: whether to raise an error if the target is missed by more than `tolerance`.
        every: number of removals after which scores other than "l1" and "l2" are computed again.
        losses: function that yields the loss of each batch, for the scores with gradients.
        generator: source of random numbers, for "random".

    Raises:
        RecipeError: if a setting is out of range or the target cannot be met.
        ModelError: if no channel can be removed, or an argument that the score needs is missing.
    """
    check_settings(graph, round_to, min_keep, "global")
    target = target or parameter_target(graph, keep_params)
    if every < 1:
        raise RecipeError(
            f"got {every}, expected a whole number of at least 1",
            place="every",
            cure="try 64",
        )

    # No layer is pruned below its smallest allowed width: `plan` would have to widen it again.
    floors = []
    for group in graph.groups:
        floors.append(allowed_widths(group, round_to, min_keep)[0])
    with _scorer(model, graph, score, every, losses, generator) as scorer:
        order = _removal_order(graph, scorer, floors, target)
    return plan(
        model,
        graph,
        order,
        target=target,
        round_to=round_to,
        min_keep=min_keep,
        tolerance=tolerance,
        exact=exact,
    )


Scorer = Callable[[list[Tensor], tuple[int, int] | None], dict[int, Tensor]]
"""Returns the new scores, layer -> [channels], of the layers whose scores are computed again.

Takes a mask of the kept channels for each layer, and the (layer, channel) that was just removed
(None before the first removal).
"""


def _removal_order(
    graph: ChannelGraph, scorer: Scorer, floors: Sequence[int], target: Target
) -> list[Tensor]:
    """Removes channels until the cost is at most 0.9 times `target`; returns the order as scores.

    It stops earlier if every layer has its smallest width. The first removed channel gets the score
    0, the second 1, and so on; the remaining channels get larger scores. So `plan` removes channels
    in this order.
    """
    rest = _Remaining(graph, floors)
    pruned: list[tuple[int, int]] = []
    rest.rescore_(scorer(rest.masks, None))
    while target.cost(rest.kept) > BEYOND_TARGET * target.wanted:
        worst = rest.worst_channel()
        if worst is None:
            break  # every layer has its smallest width
        rest.remove_(*worst)
        pruned.append(worst)
        rest.rescore_(scorer(rest.masks, worst))

    last = [divided_by_mean(values) for values in rest.raw]
    # Some scores are negative, and every remaining channel must rank above all removed ones.
    smallest = min(float(values.min()) for values in last)
    order = [len(pruned) + values - smallest for values in last]
    for position, (layer, channel) in enumerate(pruned):
        order[layer][channel] = position
    return [values.double() for values in order]


class _Remaining:
    """The channels that remain while channels are removed one by one, with their scores.

    Scores are divided by the mean over all channels of the layer; a removed channel counts with its
    last score. With the mean over the remaining channels alone, a layer of equally important
    channels would have scores near 1, however many channels are removed, and would never be pruned.

    Attributes:
        masks: for each layer, [channels] bool, which channels remain.
        kept: for each layer, the number of remaining channels.
        raw: for each layer, the last score of each channel before the division.
        floors: for each layer, how many channels it must keep.
    """

    def __init__(self, graph: ChannelGraph, floors: Sequence[int]) -> None:
        self.kept = [group.channels for group in graph.groups]
        self.masks = [torch.ones(channels, dtype=torch.bool) for channels in self.kept]
        self.raw = [torch.zeros(channels) for channels in self.kept]
        self.floors = floors
        # Cache: layer -> (score, channel) of its worst channel. A change of the layer deletes it.
        self.worst: dict[int, tuple[float, int]] = {}

    def rescore_(self, scores: Mapping[int, Tensor]) -> None:
        """Stores new raw scores of some layers.

        A removed channel whose new score is 0 keeps its last score.
        """
        for i, values in scores.items():
            known = self.masks[i] | values.ne(0)
            self.raw[i] = torch.where(known, values, self.raw[i])
            self.worst.pop(i, None)

    def worst_channel(self) -> tuple[int, int] | None:
        """Returns the (layer, channel) to remove next; None if every layer is at its floor."""
        for i in range(len(self.kept)):
            if i not in self.worst:
                self.worst[i] = self._worst_of(i)
        layer = min(range(len(self.kept)), key=lambda i: self.worst[i])
        score, channel = self.worst[layer]
        if score == float("inf"):
            return None
        return layer, channel

    def remove_(self, layer: int, channel: int) -> None:
        """Removes a channel; the scores of its layer are unchanged."""
        self.kept[layer] -= 1
        self.masks[layer][channel] = False
        self.worst.pop(layer, None)

    def _worst_of(self, layer: int) -> tuple[float, int]:
        """Returns the lowest score of a layer and its channel.

        The score is infinite if the layer must not lose another channel.
        """
        scores = divided_by_mean(self.raw[layer]).masked_fill(~self.masks[layer], float("inf"))
        least = scores.min(0)
        channel = int(least.indices)
        if self.kept[layer] <= self.floors[layer]:
            return float("inf"), channel
        return float(least.values), channel


@contextmanager
def _scorer(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    every: int,
    losses: Losses | None,
    generator: Source,
) -> Iterator[Scorer]:
    """Yields a `Scorer` for the score `name`; tensors that it zeroes are restored afterwards."""
    if name in ("l1", "l2"):
        raw_scores(model, graph, name)  # raises an error if a weight is not finite
        yield _magnitudes(model, graph, power=1 if name == "l1" else 2)
        return
    # Removed channels are zeroed in the model itself, so all its tensors are saved first.
    tensors = tensors_of(model)
    saved: dict[str, Tensor] = {}
    for group in graph.groups:
        for s in group.slices:
            saved[s.tensor] = tensors[s.tensor].clone()
    removed_since = 0

    def rescore(masks: list[Tensor], removed: tuple[int, int] | None) -> dict[int, Tensor]:
        nonlocal removed_since
        if removed is not None:
            layer, channel = removed
            _zero_(tensors, graph.groups[layer], channel)
            removed_since += 1
            # Random scores are drawn once: a single draw is a random order of all channels.
            if removed_since < every or name == "random":
                return {}
        removed_since = 0
        return dict(enumerate(raw_scores(model, graph, name, losses=losses, generator=generator)))

    try:
        yield rescore
    finally:
        for tensor, values in saved.items():
            tensors[tensor].copy_(values)


def _magnitudes(model: nn.Module, graph: ChannelGraph, *, power: Literal[1, 2]) -> Scorer:
    """Returns a `Scorer` for "l1" (power 1) or "l2" (power 2) that updates scores cheaply.

    |w|^power is summed once over the axes without channels, such as the kernel. After a removal,
    only layers whose weights read the removed channel are summed again.
    """
    axes: set[tuple[str, int]] = set()
    writers: dict[str, set[int]] = {}  # tensor -> the layers that it writes
    for i, group in enumerate(graph.groups):
        axes.update((s.tensor, s.axis) for s in group.slices)
        for s in group.slices_with_role("write"):
            writers.setdefault(s.tensor, set()).add(i)

    tensors = tensors_of(model)
    # Axes without prunable channels are summed away now, so later sums are over small tables.
    tables: dict[str, Tensor] = {}
    for tensor in writers:
        values = tensors[tensor].float().cpu().abs() ** power
        fixed = []
        for d in range(values.dim()):
            if (tensor, d) not in axes:
                fixed.append(d)
        tables[tensor] = values.sum(fixed, keepdim=True) if fixed else values

    def total(group: ChannelGroup) -> Tensor:
        parts = []
        for s in group.slices_with_role("write"):
            parts.append(channel_sums(tables[s.tensor], s))
        sums = torch.stack(parts).sum(0)
        # "l1" is the sum itself, "l2" the root of the sum of squares.
        return sums if power == 1 else sums.sqrt()

    def rescore(masks: list[Tensor], removed: tuple[int, int] | None) -> dict[int, Tensor]:
        touched = set(range(len(graph.groups)))
        if removed is not None:
            layer, channel = removed
            group = graph.groups[layer]
            # The weights that write the channel are not zeroed, so that it keeps its last score.
            _zero_(tables, group, channel, but="write")
            touched = set()
            for s in group.slices:
                touched |= writers.get(s.tensor, set())
        return {i: total(graph.groups[i]) for i in touched}

    return rescore


def _zero_(tensors: dict[str, Tensor], group: ChannelGroup, channel: int, *, but: str = "") -> None:
    """Zeroes a channel in all `tensors`, except in those where it has the role `but`."""
    for s in group.slices:
        if s.tensor in tensors and s.role != but:
            values = tensors[s.tensor]
            values.index_fill_(s.axis, s.index[channel].to(values.device), 0)
