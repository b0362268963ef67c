"""Smaller copies of a model are run: which numbers in the code follow, and which groups cannot lose channels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import (
    ChannelGraph,
    NumberSite,
    SizedNumber,
    export,
    kept_indices,
)
from fedpress.compress.prune.parity import fault, trial_batch
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import keep_indices_
from fedpress.nn.forward_sizes import Numbers, numbers_in, watch_
from fedpress.nn.resize import copied

TOLERANCE = 1e-5  # as in `check_parity`


@torch.no_grad()
def without_followers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor]
) -> ChannelGraph:
    """Drops the numbers that follow the tensors by themselves (`x.shape[1] // 2`).

    A number that always is in proportion to the length of its axis becomes a multiple of it: what it counts besides
    channels, examples say, may be another number at another time.
    """
    evidence = _Evidence(model, graph)
    for step in (1, 2) if graph.numbers else ():
        counts = _counts(graph, step)
        passed = _passed_numbers(model, graph, arguments, counts)
        for number in graph.numbers:
            given = passed[number.site.module].get(number.site.call, [])
            if number.site.position < len(given):
                evidence.add_(number, given[number.site.position], counts)
    numbers = [
        replace(number, multiple=number.multiple or evidence.is_in_proportion(number))
        for number in graph.numbers
        if not evidence.follows(number)
    ]
    return replace(graph, numbers=tuple(numbers))


class _Evidence:
    """What trials with fewer channels tell about the numbers in the code.

    Attributes:
        wrong: where the code passed another number than the smaller model needs.
        changed: where a trial needed another number than the whole model does.
        out_of_proportion: where the number was not in proportion to the length of its axis.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        corrected = numbers_in(model)  # by an earlier cut
        self.wrong = {n.site for n in graph.numbers if n.site.position in _row(corrected, n.site)}
        self.changed: set[NumberSite] = set()
        self.out_of_proportion = {n.site for n in graph.numbers if n.was != n.length.full}

    def add_(self, number: SizedNumber, code: Any, counts: Sequence[int]) -> None:
        """Notes what the `code` passed in a model without `counts[i]` channels of group i."""
        right = number.corrected(counts)
        if code != right:
            self.wrong.add(number.site)
        if right != number.was:
            self.changed.add(number.site)
        if code * number.length.without(counts) != right * number.length.full:
            self.out_of_proportion.add(number.site)

    def follows(self, number: SizedNumber) -> bool:
        """Whether the code gets the number right by itself. One that never had to change tells nothing."""
        untested = bool(number.length.times) and number.site not in self.changed
        return number.site not in self.wrong and not untested

    def is_in_proportion(self, number: SizedNumber) -> bool:
        """Whether the number was in proportion to the length of its axis in every trial."""
        return number.site not in self.out_of_proportion


def _passed_numbers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], counts: Sequence[int]
) -> dict[str, dict[str, list[Any]]]:
    """Returns what the code of a smaller copy passes by itself: module -> call -> numbers."""
    small = _smaller(model, graph, counts, exactly=True)
    passed = watch_(small, sorted({number.site.module for number in graph.numbers}))
    # What was noted before the code fails is good; where it fails is found out later.
    with suppress(Exception):
        small(*arguments)
    if any(number.site.call not in passed[number.site.module] for number in graph.numbers):
        # Code may take another path where it is exported.
        with suppress(Exception), _quiet():
            export(small, tuple(arguments))
    return passed


@torch.no_grad()
def groups_that_fail(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], *, compare: bool
) -> dict[int, str]:
    """Returns the groups without some of whose channels the model goes wrong, and how.

    Sizes that no call shows, `x.size(0) // self.num_heads` in the number of copies say, are wrong in a smaller model;
    and what runs only in training, an auxiliary head say, has not become smaller. Copies are compared with the masked
    model as `check_parity` does, if `compare` says so; they need not where half precision rounds more than that allows.
    What goes wrong only without channels of several groups at once is not found.
    """
    if not graph.groups:
        return {}
    failing: dict[int, str] = {}
    batch = trial_batch(model, tuple(arguments)) if compare else None
    counts = _counts(graph, 1)
    # Halves of a set that fails are tried by themselves, so that few culprits are soon found.
    sets = [list(range(len(graph.groups)))]
    while sets:
        tried = sets.pop()
        some = [n if i in tried else 0 for i, n in enumerate(counts)]
        reason = _failure(model, graph, some, arguments, batch)
        if len(tried) > 1:
            middle = len(tried) // 2
            sets += [tried[middle:], tried[:middle]] if reason else []
            continue
        (single,) = tried
        channels = graph.groups[single].channels
        for count in sorted({1, channels // 2}) if channels > 1 else ():
            alone = [count if i == single else 0 for i in range(len(graph.groups))]
            reason = reason or _failure(model, graph, alone, arguments, batch)
        if reason:
            failing[single] = reason
    return failing


def _failure(
    model: nn.Module,
    graph: ChannelGraph,
    counts: Sequence[int],
    arguments: Sequence[Tensor],
    batch: list[Tensor] | None,
) -> str | None:
    """Says how a copy without the first `counts[i]` channels of group i goes wrong; None if it does not."""
    pruned = [torch.arange(n) for n in counts]
    small = _smaller(model, graph, counts)
    try:
        small(*arguments)
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the code does not run with fewer of its channels ({reason})"
    if batch is None:
        return None
    wrong = fault(model, small, _plan(model, graph, pruned), batch, tolerance=TOLERANCE)
    return wrong and f"with fewer of its channels {wrong}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what torch logs of an export that fails, which here is no fault."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _counts(graph: ChannelGraph, step: int) -> list[int]:
    """Returns how many channels of each group go in a trial: at least one, and of each group another number."""
    widths = [group.channels for group in graph.groups]
    return [1 + (step * i + step) % (n - 1) if n > 1 else 0 for i, n in enumerate(widths)]


def _smaller(
    model: nn.Module, graph: ChannelGraph, counts: Sequence[int], *, exactly: bool = False
) -> nn.Module:
    pruned = [torch.arange(n) for n in counts]
    small = copied(model).eval()
    keep_indices_(small, kept_indices(model, graph, pruned), graph.sizes(pruned, exactly=exactly))
    return small


def _plan(model: nn.Module, graph: ChannelGraph, pruned: Sequence[Tensor]) -> PruningPlan:
    return PruningPlan(
        keep=kept_indices(model, graph, pruned),
        layers=(),
        unprunable={},
        parameters_before=0,
        parameters_after=0,
        approximate=graph.approximate,
    )


def _row(numbers: Numbers, site: NumberSite) -> Mapping[int, Any]:
    calls = numbers.get(site.module, {})
    return calls.get(site.call) or calls.get(site.place) or {}
