"""Runs smaller copies of a model, to see which numbers need a correction and which groups fail.

Two questions cannot be answered from the graph. Does a number in a call follow the tensors by
itself, as in `view(n, x.shape[1])`, or is it written into the code, as in `view(n, 16)`? And does
code that no call shows, such as `x / self.width`, go wrong when channels are pruned?
"""

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
    capture,
    kept_indices,
)
from fedpress.compress.prune.parity import parity_fault, trial_batch
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import keep_indices_
from fedpress.nn.forward_sizes import Numbers, numbers_in, watch_
from fedpress.nn.resize import copied

TOLERANCE = 1e-5  # as in `check_parity`


@torch.no_grad()
def drop_followers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor]
) -> ChannelGraph:
    """Returns the graph without numbers that follow the tensors by themselves (`x.shape[1]`).

    A number that is in proportion to the length of its axis in every trial becomes a multiple of
    it: `n * heads` also counts examples, whose number may differ another time.

    Args:
        model: the traced model.
        graph: its channels.
        arguments: the inputs that were traced.
    """
    evidence = _Evidence(model, graph)
    # Two trials with different widths: in one alone, a wrong number may be right by chance.
    for step in (1, 2) if graph.numbers else ():
        counts = _counts(graph, step)
        passed = _passed_numbers(model, graph, arguments, counts)
        for number in graph.numbers:
            given = passed[number.site.module].get(number.site.call, [])
            if number.site.position < len(given):
                evidence.add_(number, given[number.site.position], counts)

    numbers = []
    for number in graph.numbers:
        if not evidence.follows(number):
            multiple = number.multiple or evidence.is_in_proportion(number)
            numbers.append(replace(number, multiple=multiple))
    return replace(graph, numbers=tuple(numbers))


class _Evidence:
    """What trials with fewer channels show about the numbers in the code.

    Attributes:
        wrong: where the code passed another number than the smaller model needs.
        changed: where a trial needed another number than the whole model does.
        out_of_proportion: where the number was not in proportion to the length of its axis.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        corrected = numbers_in(model)  # by an earlier pruning
        self.wrong: set[NumberSite] = set()
        self.changed: set[NumberSite] = set()
        self.out_of_proportion: set[NumberSite] = set()
        for number in graph.numbers:
            if number.site.position in _correction_of_call(corrected, number.site):
                self.wrong.add(number.site)
            if number.was != number.length.full:
                self.out_of_proportion.add(number.site)

    def add_(self, number: SizedNumber, passed: Any, counts: Sequence[int]) -> None:
        """Notes what the code `passed` in a copy that lost `counts[i]` channels of group i."""
        right = number.corrected(counts)
        if passed != right:
            self.wrong.add(number.site)
        if right != number.was:
            self.changed.add(number.site)
        # passed / full length == right / new length, without division.
        if passed * number.length.without(counts) != right * number.length.full:
            self.out_of_proportion.add(number.site)

    def follows(self, number: SizedNumber) -> bool:
        """Returns whether the code gets the number right by itself.

        A number that did not have to change in any trial shows nothing, so it counts as one that
        does not.
        """
        untested = bool(number.length.times) and number.site not in self.changed
        return number.site not in self.wrong and not untested

    def is_in_proportion(self, number: SizedNumber) -> bool:
        """Returns whether the number was in proportion to the length of its axis in every trial."""
        return number.site not in self.out_of_proportion


def _passed_numbers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], counts: Sequence[int]
) -> dict[str, dict[str, list[Any]]]:
    """Returns what the code of a smaller copy passes by itself: module -> call -> numbers."""
    small = _smaller_copy(model, graph, counts, exactly=True)
    modules = sorted({number.site.module for number in graph.numbers})
    passed = watch_(small, modules)
    # The copy may fail here; the numbers up to that point are still valid, and `groups_that_fail`
    # runs it again.
    with suppress(Exception):
        small(*arguments)
    if any(number.site.call not in passed[number.site.module] for number in graph.numbers):
        # Code may take another path where it is captured.
        with suppress(Exception), _quiet():
            capture(small, tuple(arguments))
    return passed


@torch.no_grad()
def groups_that_fail(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], *, compare: bool
) -> dict[int, str]:
    """Returns the groups that cannot lose channels because the model goes wrong, and why.

    Two kinds are found here: sizes that no call shows (`x.size(0) // self.num_heads` copies), and
    parts that run only in training, such as an auxiliary head, which have not become smaller. What
    goes wrong only if several groups lose channels at once is not found.

    Args:
        model: the traced model.
        graph: its channels.
        arguments: the inputs that were traced.
        compare: whether copies are compared with the masked model, as `check_parity` does;
            otherwise they only have to run.
    """
    if not graph.groups:
        return {}
    failing: dict[int, str] = {}
    batch = trial_batch(model, tuple(arguments)) if compare else None
    counts = _counts(graph, 1)
    # Bisection: usually few groups fail, and one trial then clears many others at once.
    pending = [list(range(len(graph.groups)))]
    while pending:
        tried = pending.pop()
        some = [count if i in tried else 0 for i, count in enumerate(counts)]
        reason = _failure(model, graph, some, arguments, batch)
        if len(tried) > 1:
            if reason:
                middle = len(tried) // 2
                pending += [tried[middle:], tried[:middle]]
            continue

        # A single group is tried at two more widths, since some widths are right by chance.
        (single,) = tried
        channels = graph.groups[single].channels
        for count in sorted({1, channels // 2}) if channels > 1 else ():
            alone = [0] * len(graph.groups)
            alone[single] = count
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
    """Returns what goes wrong without the first `counts[i]` channels of group i, or None."""
    small = _smaller_copy(model, graph, counts)
    try:
        small(*arguments)
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the code does not run with fewer of its channels ({reason})"
    if batch is None:
        return None
    fault = parity_fault(model, small, _plan(model, graph, counts), batch, tolerance=TOLERANCE)
    return fault and f"with fewer of its channels {fault}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch logs about a capture that fails, which is no fault here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _counts(graph: ChannelGraph, step: int) -> list[int]:
    """Returns how many channels each group loses in a trial: at least one, and different numbers.

    Groups of the same width lose different numbers, so that a size of one is not taken for that of
    another.
    """
    counts = []
    for i, group in enumerate(graph.groups):
        most = group.channels - 1  # a group keeps at least one channel
        counts.append(1 + (step * i + step) % most if most else 0)
    return counts


def _first_channels(counts: Sequence[int]) -> list[Tensor]:
    return [torch.arange(count) for count in counts]


def _smaller_copy(
    model: nn.Module, graph: ChannelGraph, counts: Sequence[int], *, exactly: bool = False
) -> nn.Module:
    """Returns a copy without the first `counts[i]` channels of group i."""
    pruned = _first_channels(counts)
    small = copied(model).eval()
    keep_indices_(small, kept_indices(model, graph, pruned), graph.sizes(pruned, exactly=exactly))
    return small


def _plan(model: nn.Module, graph: ChannelGraph, counts: Sequence[int]) -> PruningPlan:
    """Returns a plan for the comparison, which reads only `keep` and `approximate`."""
    return PruningPlan(
        keep=kept_indices(model, graph, _first_channels(counts)),
        layers=(),
        unprunable={},
        parameters_before=0,
        parameters_after=0,
        approximate=graph.approximate,
    )


def _correction_of_call(numbers: Numbers, site: NumberSite) -> Mapping[int, Any]:
    """Returns the corrections of a call: its own, or those of all calls at its place."""
    calls = numbers.get(site.module, {})
    return calls.get(site.call) or calls.get(site.place) or {}
