"""Runs smaller copies of a model to find out what its graph does not show (trial pruning).

Two questions: Does the code compute a size from its tensors, as in `view(n, x.shape[1])`, or is the
size a constant, as in `view(n, 16)`, which must be corrected? And does code with sizes in other
places, such as `x / self.width`, give wrong results when channels are pruned?
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
from fedpress.nn.forward_sizes import Numbers, numbers_in, record_numbers_
from fedpress.nn.resize import copied

TOLERANCE = 1e-5  # as in `check_parity`


@torch.no_grad()
def drop_self_adjusting_numbers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor]
) -> ChannelGraph:
    """Returns the graph without numbers that need no correction, such as `x.shape[1]`.

    A number is marked as a multiple (such as `n * heads`) if it is in proportion to the length of
    its axis in every trial, because the batch size n may differ in later calls.

    Args:
        model: the traced model.
        graph: its channels.
        arguments: the inputs that were traced.
    """
    evidence = _Evidence(model, graph)
    # Two trials with different widths: a wrong number may be right by chance in one of them.
    for step in (1, 2) if graph.sized_numbers else ():
        counts = _trial_counts(graph, step)
        passed = _passed_numbers(model, graph, arguments, counts)
        for number in graph.sized_numbers:
            given = passed[number.site.module].get(number.site.call, [])
            if number.site.position < len(given):
                evidence.add_(number, given[number.site.position], counts)

    numbers = []
    for number in graph.sized_numbers:
        if not evidence.adjusts_itself(number):
            multiple = number.multiple or evidence.is_in_proportion(number)
            numbers.append(replace(number, multiple=multiple))
    return replace(graph, sized_numbers=tuple(numbers))


class _Evidence:
    """Observations about the numbers in the code, from trials with fewer channels.

    Attributes:
        wrong: numbers for which the code passed another value than the smaller model needs.
        changed: numbers for which a smaller model needs another value than the whole model.
        out_of_proportion: numbers that were not in proportion to the length of their axis.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        corrected = numbers_in(model)  # by an earlier pruning
        self.wrong: set[NumberSite] = set()
        self.changed: set[NumberSite] = set()
        self.out_of_proportion: set[NumberSite] = set()
        for number in graph.sized_numbers:
            if number.site.position in _correction_of_call(corrected, number.site):
                self.wrong.add(number.site)
            if number.traced_value != number.length.full:
                self.out_of_proportion.add(number.site)

    def add_(self, number: SizedNumber, passed: Any, counts: Sequence[int]) -> None:
        """Adds one trial: without `counts[i]` channels of group i, the code passed `passed`."""
        right = number.corrected(counts)
        if passed != right:
            self.wrong.add(number.site)
        if right != number.traced_value:
            self.changed.add(number.site)
        # passed / full length == right / new length, without division.
        if passed * number.length.without(counts) != right * number.length.full:
            self.out_of_proportion.add(number.site)

    def adjusts_itself(self, number: SizedNumber) -> bool:
        """Returns whether the code itself computes the right number for smaller tensors.

        False also if this is unknown: the number depends on channels, but every smaller model
        needed the same value as the whole model.
        """
        untested = bool(number.length.indices_per_channel) and number.site not in self.changed
        return number.site not in self.wrong and not untested

    def is_in_proportion(self, number: SizedNumber) -> bool:
        """Returns whether the number was in proportion to the length of its axis in every trial."""
        return number.site not in self.out_of_proportion


def _passed_numbers(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], counts: Sequence[int]
) -> dict[str, dict[str, list[Any]]]:
    """Returns the numbers that the code of a smaller copy passes: module -> call -> numbers."""
    small = _smaller_copy(model, graph, counts, for_traced_batch=True)
    modules = sorted({number.site.module for number in graph.sized_numbers})
    passed = record_numbers_(small, modules)
    # The copy may fail here; the numbers up to that point are still valid, and `groups_that_fail`
    # runs it again.
    with suppress(Exception):
        small(*arguments)
    if any(number.site.call not in passed[number.site.module] for number in graph.sized_numbers):
        # Some code takes another path while it is captured (`torch.compiler.is_exporting()`).
        with suppress(Exception), _quiet():
            capture(small, tuple(arguments))
    return passed


@torch.no_grad()
def groups_that_fail(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], *, compare: bool
) -> dict[int, str]:
    """Returns index -> reason for each group that cannot be pruned because a smaller copy fails.

    Two kinds of failure are found: sizes outside of recorded calls (`x.size(0) // self.num_heads`),
    and modules that run only in training, such as an auxiliary head, and were therefore not pruned.
    Failures that need several groups to be pruned at once are not found.

    Args:
        model: the traced model.
        graph: its channels.
        arguments: the inputs that were traced.
        compare: whether the outputs of a copy are compared with the model whose pruned channels
            are zero, as in `check_parity`; otherwise copies only have to run.
    """
    if not graph.groups:
        return {}
    failing: dict[int, str] = {}
    batch = trial_batch(model, tuple(arguments)) if compare else None
    counts = _trial_counts(graph, 1)
    # Bisection: usually few groups fail, so one trial shows that many others are fine.
    pending = [list(range(len(graph.groups)))]
    while pending:
        tried = pending.pop()
        # Only the groups of this trial lose channels.
        some = [0] * len(counts)
        for i in tried:
            some[i] = counts[i]
        reason = _failure(model, graph, some, arguments, batch)
        if len(tried) > 1:
            if reason:
                middle = len(tried) // 2
                pending += [tried[middle:], tried[:middle]]
            continue

        # A single group is tried at two more widths, since a wrong size may fit one by chance.
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
    """Returns how a copy without the first `counts[i]` channels of group i fails, or None."""
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
    """Silences logging: torch logs errors of a failing capture, which is expected here."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _trial_counts(graph: ChannelGraph, step: int) -> list[int]:
    """Returns how many channels each group loses in a trial; a group of one channel loses none.

    Groups of equal width lose different numbers of channels if they are wide enough, so that their
    sizes can be told apart.
    """
    counts = []
    for i, group in enumerate(graph.groups):
        most = group.channels - 1  # a group keeps at least one channel
        counts.append(1 + (step * i + step) % most if most else 0)
    return counts


def _first_channels(counts: Sequence[int]) -> list[Tensor]:
    return [torch.arange(count) for count in counts]


def _smaller_copy(
    model: nn.Module, graph: ChannelGraph, counts: Sequence[int], *, for_traced_batch: bool = False
) -> nn.Module:
    """Returns a copy without the first `counts[i]` channels of group i."""
    pruned = _first_channels(counts)
    small = copied(model).eval()
    keep_indices_(
        small,
        kept_indices(model, graph, pruned),
        graph.corrections(pruned, for_traced_batch=for_traced_batch),
    )
    return small


def _plan(model: nn.Module, graph: ChannelGraph, counts: Sequence[int]) -> PruningPlan:
    """Returns a plan with the two fields that the comparison reads: `keep` and `approximate`."""
    return PruningPlan(
        keep=kept_indices(model, graph, _first_channels(counts)),
        layers=(),
        unprunable={},
        parameters_before=0,
        parameters_after=0,
        approximate=graph.approximate,
    )


def _correction_of_call(numbers: Numbers, site: NumberSite) -> Mapping[int, Any]:
    """Returns the corrections of one call, or those that hold for all calls at its place."""
    calls = numbers.get(site.module, {})
    return calls.get(site.call) or calls.get(site.place) or {}
