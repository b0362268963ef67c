"""Smaller copies of a model are run: which numbers in the code follow, and which layers cannot become smaller."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.compress.prune.graph import ChannelGraph, Site, export, kept_indices
from fedpress.compress.prune.parity import fault, trial_batch
from fedpress.compress.prune.plan import PruningPlan
from fedpress.compress.prune.remove import cut_
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
    fixed = numbers_in(model)  # an earlier cut has put these right
    wrong: set[Site] = {n.site for n in graph.numbers if n.site.position in _row(fixed, n.site)}
    changed: set[Site] = set()  # a number that never had to change says nothing
    partly: set[Site] = {n.site for n in graph.numbers if n.was != n.length.whole}
    for step in (1, 2) if graph.numbers else ():
        counts = _counts(graph, step)
        small = _smaller(model, graph, counts, exactly=True)
        seen = watch_(small, sorted({number.site.module for number in graph.numbers}))
        with suppress(
            Exception
        ):  # what was noted so far is good; where the code fails is found out later
            small(*arguments)
        if any(number.site.call not in seen[number.site.module] for number in graph.numbers):
            with suppress(Exception), _quiet():  # code may take another path where it is exported
                export(small, tuple(arguments))
        for number in graph.numbers:
            passed = seen[number.site.module].get(number.site.call, [])
            if number.site.position < len(passed):
                code, wanted = passed[number.site.position], number.wanted(counts)
                wrong |= {number.site} if code != wanted else set()
                changed |= {number.site} if wanted != number.was else set()
                if code * number.length.at(counts) != wanted * number.length.whole:
                    partly.add(number.site)
    stay = [
        n for n in graph.numbers if n.site in wrong or (n.length.times and n.site not in changed)
    ]
    return replace(
        graph, numbers=tuple(replace(n, multiple=n.multiple or n.site not in partly) for n in stay)
    )


@torch.no_grad()
def layers_that_fail(
    model: nn.Module, graph: ChannelGraph, arguments: Sequence[Tensor], *, compare: bool
) -> dict[int, str]:
    """Returns the layers without some of whose channels the model goes wrong, and how.

    Sizes that no call shows, `x.size(0) // self.num_heads` in the number of copies say, are wrong in a smaller model;
    and what runs only in training, an auxiliary head say, has not become smaller. Copies are compared with the masked
    model as `check_parity` does, if `compare` says so; they need not where half precision rounds more than that allows.
    What goes wrong only without channels of several layers at once is not found.
    """
    failing: dict[int, str] = {}
    batch = trial_batch(model, tuple(arguments)) if graph.layers and compare else None
    groups = [list(range(len(graph.layers)))] if graph.layers else []
    counts = _counts(graph, 1)
    while (
        groups
    ):  # halves of a group that fails are tried by themselves, so that few culprits are soon found
        group = groups.pop()
        reason = _failure(
            model, graph, [n if i in group else 0 for i, n in enumerate(counts)], arguments, batch
        )
        if len(group) > 1:
            middle = len(group) // 2
            groups += [group[middle:], group[:middle]] if reason else []
            continue
        at, channels = group[0], graph.layers[group[0]].channels
        for count in sorted({1, channels // 2}) if channels > 1 else ():
            alone = [count if i == at else 0 for i in range(len(graph.layers))]
            reason = reason or _failure(model, graph, alone, arguments, batch)
        if reason:
            failing[at] = reason
    return failing


def _failure(
    model: nn.Module,
    graph: ChannelGraph,
    counts: Sequence[int],
    arguments: Sequence[Tensor],
    batch: list[Tensor] | None,
) -> str | None:
    """Says how a copy without the first `counts[i]` channels of layer i goes wrong; None if it does not."""
    gone = [torch.arange(n) for n in counts]
    small = _smaller(model, graph, counts)
    try:
        small(*arguments)
    except Exception as error:  # the user's code may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the code does not run with fewer of its channels ({reason})"
    if batch is None:
        return None
    wrong = fault(model, small, _plan(model, graph, gone), batch, tolerance=TOLERANCE)
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
    """Returns how many channels of each layer go in a trial: at least one, and of each layer another number."""
    widths = [layer.channels for layer in graph.layers]
    return [1 + (step * i + step) % (n - 1) if n > 1 else 0 for i, n in enumerate(widths)]


def _smaller(
    model: nn.Module, graph: ChannelGraph, counts: Sequence[int], *, exactly: bool = False
) -> nn.Module:
    gone = [torch.arange(n) for n in counts]
    small = copied(model).eval()
    cut_(small, kept_indices(model, graph, gone), graph.sizes(gone, exactly=exactly))
    return small


def _plan(model: nn.Module, graph: ChannelGraph, gone: Sequence[Tensor]) -> PruningPlan:
    return PruningPlan(
        keep=kept_indices(model, graph, gone),
        layers=(),
        whole={},
        parameters_before=0,
        parameters_after=0,
        approximate=graph.approximate,
    )


def _row(numbers: Numbers, site: Site) -> Mapping[int, Any]:
    calls = numbers.get(site.module, {})
    return calls.get(site.call) or calls.get(site.place) or {}
