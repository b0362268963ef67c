"""Single-channel pruning: remove the one worst channel of all, score again, and so on until the share is met.

What is kept in one layer changes how much a channel of the next can do, so the order differs from one-shot pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    """Removes until a little less than `target` is left; returns when each channel went, and the survivors after them.

    A layer's scores are taken relative to all its channels, removed ones with their last score: relative to the
    survivors alone, a layer whose scores lie close together would never be touched.
    """
    alive = [torch.ones(group.channels, dtype=torch.bool) for group in graph.groups]
    kept = [group.channels for group in graph.groups]
    raw: list[Tensor] = [torch.zeros(group.channels) for group in graph.groups]
    pruned: list[tuple[int, int]] = []
    worst: list[tuple[float, int]] = [(float("inf"), 0)] * len(kept)
    news = scorer(alive, None)
    while True:
        for i, values in news.items():
            raw[i] = torch.where(alive[i] | values.ne(0), values, raw[i])
        for i in {*news, *(i for i, _ in pruned[-1:])}:
            least = relative(raw[i]).masked_fill(~alive[i], float("inf")).min(0)
            worst[i] = (
                float(least.values) if kept[i] > floors[i] else float("inf"),
                int(least.indices),
            )
        group = min(range(len(worst)), key=lambda i: worst[i])
        if target.cost(kept) <= BEYOND * target.wanted or worst[group][0] == float("inf"):
            break
        pruned.append((group, worst[group][1]))
        kept[group] -= 1
        alive[group][worst[group][1]] = False
        news = scorer(alive, pruned[-1])
    last = [relative(values) for values in raw]
    least_left = min(float(values.min()) for values in last)  # some scores have signs
    order = [len(pruned) + values - least_left for values in last]
    for at, (i, channel) in enumerate(pruned):
        order[i][channel] = at
    return [values.double() for values in order]


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
