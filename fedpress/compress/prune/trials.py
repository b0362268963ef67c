"""Runs smaller copies of a model to find out what its graph does not show (trial pruning).

Two questions: Does the code compute a size from its tensors, as in `view(n, x.shape[1])`, or is the
size a constant, as in `view(n, 16)`, which must be corrected? And does code with sizes in other
places, such as `x / self.width`, give wrong results when channels are pruned?
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.prune.dry_runs import dry_calls, meta_copy, smaller_images
from fedpress.compress.prune.graph import (
    ChannelGraph,
    NumberSite,
    SizedNumber,
    capture,
    kept_indices,
)
from fedpress.compress.prune.parity import Candidate, drawn_batch, parity_fault, trial_batch
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import keep_indices_
from fedpress.nn.forward_sizes import Numbers, numbers_in, record_numbers_
from fedpress.nn.resize import copied

TOLERANCE = 1e-5  # as in `check_parity`
Passed = dict[str, dict[str, list[Any]]]
"""Module -> call -> the numbers that the module's code passes in this call."""


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
) -> Passed:
    """Returns the numbers that the code of a smaller copy passes: module -> call -> numbers."""
    modules = sorted({number.site.module for number in graph.sized_numbers})
    passed: Passed = {}

    def recording(*, of_meta: bool) -> nn.Module:
        nonlocal passed
        small = _smaller_copy(model, graph, counts, for_traced_batch=True, of_meta=of_meta)
        passed = record_numbers_(small, modules)
        return small

    if dry_calls(lambda: recording(of_meta=True), arguments) is None:
        small = recording(of_meta=False)
        # The copy may fail here; the numbers up to that point are still valid, and
        # `groups_that_fail` runs it again.
        with suppress(Exception):
            small(*arguments)
    if any(number.site.call not in passed[number.site.module] for number in graph.sized_numbers):
        # Some code takes another path while it is captured (`torch.compiler.is_exporting()`).
        eager = passed
        small = recording(of_meta=False)
        with suppress(Exception), _quiet():
            capture(small, tuple(arguments))
        passed = {module: {**eager[module], **passed[module]} for module in modules}
    return passed


@torch.no_grad()
def groups_that_fail(
    model: nn.Module,
    graph: ChannelGraph,
    arguments: Sequence[Tensor],
    *,
    compare: bool,
    embeds: bool = True,
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
        embeds: whether the model may have embeddings, whose inputs must be valid indices.
    """
    if not graph.groups:
        return {}
    failing: dict[int, str] = {}
    trials = _Trials(model, graph, tuple(arguments), compare=compare, embeds=embeds)
    counts = _trial_counts(graph, 1)
    # Bisection: usually few groups fail, so one trial shows that many others are fine.
    pending = [list(range(len(graph.groups)))]
    while pending:
        tried = pending.pop()
        # Only the groups of this trial lose channels.
        some = [0] * len(counts)
        for i in tried:
            some[i] = counts[i]
        reason = trials.failure(some)
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
            reason = reason or trials.failure(alone)
        if reason:
            failing[single] = reason
    return failing


class _Trials:
    """Runs smaller copies of one model, on inputs as small as its code allows.

    A copy first runs on the traced inputs without values (see `dry_runs`). Then its outputs are
    compared with those of the masked model: on small images if the code calls the same functions
    on them as on the traced ones, else on inputs of the traced size.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        arguments: tuple[Tensor, ...],
        *,
        compare: bool,
        embeds: bool,
    ) -> None:
        self._model = model
        self._graph = graph
        self._arguments = arguments
        self._compare = compare
        self._embeds = embeds
        self._small_images = smaller_images(arguments)
        # Kind of batch -> the batch, once it is made.
        self._batches: dict[str, list[Tensor]] = {}

    def failure(self, counts: Sequence[int]) -> str | None:
        """Returns how a copy without the first `counts[i]` channels of group i fails, or None."""
        calls = None
        if self._compare:
            calls = dry_calls(lambda: self._smaller(counts, of_meta=True), self._arguments)
        if calls is None:
            try:
                self._smaller(counts)(*self._arguments)
            except Exception as error:  # the user's code may raise anything
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                return f"the code does not run with fewer of its channels ({reason})"
        if not self._compare:
            return None
        fault = parity_fault(
            self._model,
            lambda: self._smaller(counts),
            _plan(self._model, self._graph, counts),
            self._candidates(calls),
            tolerance=TOLERANCE,
        )
        return fault and f"with fewer of its channels {fault}"

    def _candidates(self, calls: Sequence[Any] | None) -> list[Candidate]:
        """Returns the batches for a copy that calls these functions on the traced inputs."""
        # Random values on which the model has been found to run.
        tested = Candidate(self._batch("tested", lambda: trial_batch(self._model, self._arguments)))
        if self._embeds:
            return [tested]
        candidates = [
            Candidate(self._batch("traced", lambda: drawn_batch(self._arguments))),
            tested,
        ]
        images = self._small_images
        if calls is not None and images is not None:
            small = self._batch("small", lambda: drawn_batch(tuple(images)))
            candidates.insert(0, Candidate(small, calls))
        return candidates

    def _smaller(self, counts: Sequence[int], *, of_meta: bool = False) -> nn.Module:
        return _smaller_copy(self._model, self._graph, counts, of_meta=of_meta)

    def _batch(self, kind: str, make: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Returns a function that makes a batch when it is first called."""

        def made() -> list[Tensor]:
            if kind not in self._batches:
                self._batches[kind] = make()
            return self._batches[kind]

        return made


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
    model: nn.Module,
    graph: ChannelGraph,
    counts: Sequence[int],
    *,
    for_traced_batch: bool = False,
    of_meta: bool = False,
) -> nn.Module:
    """Returns a copy without the first `counts[i]` channels of group i.

    Args:
        model: the traced model.
        graph: its channels.
        counts: how many channels each group loses.
        for_traced_batch: see `ChannelGraph.corrections`.
        of_meta: whether the copy has tensors without values, see `meta_copy`.
    """
    pruned = _first_channels(counts)
    small = meta_copy(model) if of_meta else copied(model).eval()
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
