"""Single-channel pruning: remove the one worst channel of all, score again, and so on until the share is met.

What is kept in one layer changes how much a channel of the next can do, so the order differs from one-shot pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, ChannelGroup
from fedpress.compress.prune.plan import PruningPlan, allowed_widths, check_settings, plan
from fedpress.compress.prune.scores import Losses, channel_sums, raw_scores, relative, tensors_of
from fedpress.compress.prune.targets import Target, parameter_target
from fedpress.core.random_source import Source
from fedpress.errors import RecipeError

BEYOND = 0.9  # removal goes on to this part of the target, so that rounding up somewhere can be paid for elsewhere


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
    """Plans the removal of channels one at a time, worst first, then rounds the widths.

    "l1" and "l2" are scored again after every channel. The other scores look at the whole network, so they are taken
    again after `every` channels, with the removed ones zeroed. All tensors of `model` are as before afterwards.

    Args:
        model: the traced model.
        graph: its channels.
        score: a row of `fedpress.compress.SCORES`.
        keep_params: share of the parameters to keep, in (0, 1].
        target: what to come down to instead (see `fedpress.compress.prune.targets`).
        round_to: widths become multiples of this.
        min_keep: smallest share of a layer that stays.
        tolerance: largest difference between the wanted and the reached share, of which nothing is told.
        exact: refuses a target that is missed by more than `tolerance`.
        every: removals between two rounds of scoring, for scores other than "l1" and "l2".
        losses: for the scores that need them.
        generator: for "random".

    Raises:
        RecipeError: if a setting is out of range or the share cannot be met.
        ModelError: if no channel can be removed, or the score lacks what it needs.
    """
    check_settings(graph, round_to, min_keep, "global")
    target = target or parameter_target(graph, keep_params)
    if every < 1:
        raise RecipeError(
            f"got {every}, expected a whole number of at least 1",
            place="every",
            cure="try 64",
        )
    floors = [allowed_widths(group, round_to, min_keep)[0] for group in graph.groups]
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
"""Takes who is alive and who was just removed (layer, channel); returns the layers whose raw scores are new."""


def _removal_order(
    graph: ChannelGraph, scorer: Scorer, floors: Sequence[int], target: Target
) -> list[Tensor]:
    """Removes until a little less than `target` is left; returns when each channel went, survivors last."""
    rest = _Survivors(graph, floors)
    pruned: list[tuple[int, int]] = []
    rest.rescore_(scorer(rest.alive, None))
    while target.cost(rest.kept) > BEYOND * target.wanted:
        weakest = rest.weakest()
        if weakest is None:
            break  # every layer is at its floor
        rest.remove_(*weakest)
        pruned.append(weakest)
        rest.rescore_(scorer(rest.alive, weakest))
    last = [relative(values) for values in rest.raw]
    least_left = min(float(values.min()) for values in last)  # some scores have signs
    order = [len(pruned) + values - least_left for values in last]
    for at, (i, channel) in enumerate(pruned):
        order[i][channel] = at
    return [values.double() for values in order]


class _Survivors:
    """The channels that are left while they are removed one by one, and the weakest of each layer.

    A layer's scores are taken relative to all its channels, removed ones with their last score: relative to the
    survivors alone, a layer whose scores lie close together would never be touched.

    Attributes:
        alive: of each layer, which channels are left.
        kept: how many these are.
        raw: the last score of each channel.
        floors: how many must stay.
    """

    def __init__(self, graph: ChannelGraph, floors: Sequence[int]) -> None:
        self.alive = [torch.ones(group.channels, dtype=torch.bool) for group in graph.groups]
        self.kept = [group.channels for group in graph.groups]
        self.raw = [torch.zeros(group.channels) for group in graph.groups]
        self.floors = floors
        self.worst: dict[int, tuple[float, int]] = {}  # of each layer; looked up when asked for

    def rescore_(self, scores: Mapping[int, Tensor]) -> None:
        """Takes new raw scores of some layers. A removed channel, whose weights are 0, keeps its last one."""
        for i, values in scores.items():
            known = self.alive[i] | values.ne(0)
            self.raw[i] = torch.where(known, values, self.raw[i])
            self.worst.pop(i, None)

    def weakest(self) -> tuple[int, int] | None:
        """Returns the layer and the channel that go next; None if none may."""
        for i in range(len(self.kept)):
            if i not in self.worst:
                self.worst[i] = self._worst_of(i)
        layer = min(range(len(self.kept)), key=lambda i: self.worst[i])
        score, channel = self.worst[layer]
        return None if score == float("inf") else (layer, channel)

    def remove_(self, layer: int, channel: int) -> None:
        """Takes a channel out; the scores of its layer stay what they are."""
        self.kept[layer] -= 1
        self.alive[layer][channel] = False
        self.worst.pop(layer, None)

    def _worst_of(self, layer: int) -> tuple[float, int]:
        """Returns the least relative score of a layer and its channel; an infinite one where none may go."""
        scores = relative(self.raw[layer]).masked_fill(~self.alive[layer], float("inf"))
        least = scores.min(0)
        may_go = self.kept[layer] > self.floors[layer]
        return float(least.values) if may_go else float("inf"), int(least.indices)


@contextmanager
def _scorer(
    model: nn.Module,
    graph: ChannelGraph,
    name: str,
    every: int,
    losses: Losses | None,
    generator: Source,
) -> Iterator[Scorer]:
    if name in ("l1", "l2"):
        raw_scores(model, graph, name)  # refuses what is not finite
        yield _magnitudes(model, graph, power=1 if name == "l1" else 2)
        return
    tensors = tensors_of(model)
    saved = {s.tensor: tensors[s.tensor].clone() for group in graph.groups for s in group.slices}
    since = 0

    def again(alive: list[Tensor], removed: tuple[int, int] | None) -> dict[int, Tensor]:
        nonlocal since
        if removed is not None:
            _zero_(tensors, graph.groups[removed[0]], removed[1])
            since += 1
            if since < every or name == "random":
                return {}
        since = 0
        return dict(enumerate(raw_scores(model, graph, name, losses=losses, generator=generator)))

    try:
        yield again
    finally:
        for tensor, values in saved.items():
            tensors[tensor].copy_(values)


def _magnitudes(model: nn.Module, graph: ChannelGraph, *, power: Literal[1, 2]) -> Scorer:
    """Keeps sums of |w|^power over kernels [out, in], and adds up only the layers that a removal touches."""
    tensors, tables = tensors_of(model), {}
    axes = {(s.tensor, s.axis) for group in graph.groups for s in group.slices}
    for tensor in {s.tensor for group in graph.groups for s in group.role("write")}:
        values = tensors[tensor].float().cpu().abs() ** power
        fixed = [d for d in range(values.dim()) if (tensor, d) not in axes]
        tables[tensor] = values.sum(fixed, keepdim=True) if fixed else values
    writers: dict[str, set[int]] = {}
    for i, group in enumerate(graph.groups):
        for s in group.role("write"):
            writers.setdefault(s.tensor, set()).add(i)

    def total(group: ChannelGroup) -> Tensor:
        sums = torch.stack([channel_sums(tables[s.tensor], s) for s in group.role("write")]).sum(0)
        return sums if power == 1 else sums.sqrt()

    def again(alive: list[Tensor], removed: tuple[int, int] | None) -> dict[int, Tensor]:
        touched = set(range(len(graph.groups)))
        if removed is not None:
            group = graph.groups[removed[0]]
            _zero_(tables, group, removed[1], but="write")
            touched = {i for s in group.slices for i in writers.get(s.tensor, ())}
        return {i: total(graph.groups[i]) for i in touched}

    return again


def _zero_(tensors: dict[str, Tensor], group: ChannelGroup, channel: int, *, but: str = "") -> None:
    for s in group.slices:
        if s.tensor in tensors and s.role != but:
            tensors[s.tensor].index_fill_(s.axis, s.index[channel].to(tensors[s.tensor].device), 0)
