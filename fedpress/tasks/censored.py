"""Concordance index, Brier score and Kaplan-Meier curve of censored times, from histograms.

Histograms of batches or clients can be added, so no times and no scores need to be stored. Times
are counted on a fine grid: each interval of the task is divided into `parts` bins of equal width,
and the last bin holds every time after the last interval. Two times in one bin are taken as equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RISK_BINS = 1024
"""Number of bins of a histogram of risks."""
TIME_BINS = 128
"""Least number of time bins, over all intervals."""
# A bin is a range of asinh(risk). Risks are logits of float64 probabilities, which end at 37.
WIDEST = math.asinh(37.0)


@dataclass(frozen=True)
class Grid:
    """The bins of time: those of each interval (edge before, edge], and one after the last edge.

    Attributes:
        edges: ends of the K intervals, ascending; the first one begins at 0.

    >>> grid = Grid((1.0, 3.0))
    >>> grid.bins(torch.tensor([0.5, 1.0, 3.0, 9.0])).tolist()
    [31, 63, 127, 128]
    """

    edges: tuple[float, ...]

    @property
    def parts(self) -> int:
        """Number of bins in one interval."""
        return -(-TIME_BINS // len(self.edges))

    @property
    def size(self) -> int:
        """Number of all bins."""
        return self.parts * len(self.edges) + 1

    def bins(self, times: Tensor) -> Tensor:
        """Returns the bin of each time, int64 [n]; an edge belongs to the interval that it ends."""
        # Edges are rounded as times are: a time of 0.1 is not after the edge 0.1.
        edges = torch.tensor((0.0, *self.edges), dtype=times.dtype, device=times.device).double()
        times = times.double()
        at = (times[:, None] > edges[1:]).sum(1)
        inside = at.clamp_max(len(self.edges) - 1)
        start, end = edges[inside], edges[inside + 1]
        part = ((times - start) / (end - start) * self.parts).ceil().long() - 1
        found = inside * self.parts + part.clamp(0, self.parts - 1)
        return torch.where(at == len(self.edges), self.size - 1, found)

    def at_edges(self, by_bin: Tensor) -> Tensor:
        """Returns of values at the ends of all bins [size, ...] those at the edges [K, ...]."""
        return by_bin[self.parts - 1 : -1 : self.parts]


def risk_bins(risks: Tensor) -> Tensor:
    """Returns the bin of each risk on the scale of logits, int64 [n]; NaN is not allowed."""
    # asinh is increasing, so it keeps the order of risks. Its bins are narrow near 0.
    place = (torch.asinh(risks.double()) / WIDEST).clamp(-1, 1)
    return ((place + 1) / 2 * (RISK_BINS - 1)).round().long()


def pair_counts(grid: Grid, bins: Tensor, events: Tensor, risks: Tensor) -> Tensor:
    """Returns histograms of censored examples and of events, int64 [2, grid.size, RISK_BINS].

    Args:
        grid: the bins of time.
        bins: bin of each example's time [n].
        events: whether the event was seen, bool [n]; else the time is censored.
        risks: predicted risk on the scale of logits [n].
    """
    index = (events.long() * grid.size + bins) * RISK_BINS + risk_bins(risks)
    counts = index.bincount(minlength=2 * grid.size * RISK_BINS)
    return counts.view(2, grid.size, RISK_BINS)


def concordance(counts: Tensor) -> tuple[float, float | None]:
    """Returns Harrell's concordance index and its standard error, from `pair_counts`.

    Two examples are comparable if it is known who had the event first: one has an event, and the
    other one a later time, or is censored at the same time (Harrell et al. 1982). The index is the
    share of comparable pairs in which the one with the earlier event has the higher risk; equal
    risks count half. It is NaN without a comparable pair.

    The standard error is that of a ratio of two U-statistics: with n_i concordant and d_i
    comparable pairs of example i, and D comparable pairs in all, its square is the sum of
    ((n_i - C d_i) / D)^2 (Hoeffding 1948).
    """
    censored, events = counts.double()
    # Who outlived an event of each bin, [time, risk]: everyone later, and who is censored in it.
    later = _after(censored + events) + censored
    # Whose events each example outlived; a censored one also those of its own bin.
    before = _before(events)
    before_censored = before + events
    # Pairs in which the event has the higher risk, for the earlier and for the later example.
    won = _lower(later)
    lost, lost_censored = _higher(before), _higher(before_censored)
    pairs = float((events * later.sum(1, keepdim=True)).sum())
    if not pairs:
        return math.nan, None
    index = float((events * won).sum()) / pairs

    def surplus(right: Tensor, comparable: Tensor) -> Tensor:
        return right - index * comparable.sum(1, keepdim=True)

    of_events = surplus(won + lost, later + before)
    of_censored = surplus(lost_censored, before_censored)
    squares = (events * of_events.square()).sum() + (censored * of_censored.square()).sum()
    return index, math.sqrt(float(squares)) / pairs


def _after(by_bin: Tensor) -> Tensor:
    """Returns for each time bin the sum over later bins."""
    return by_bin.sum(0) - by_bin.cumsum(0)


def _before(by_bin: Tensor) -> Tensor:
    """Returns for each time bin the sum over earlier bins."""
    return by_bin.cumsum(0) - by_bin


def _lower(by_risk: Tensor) -> Tensor:
    """Returns for each risk the sum over lower risks, and half of that of the same risk."""
    return by_risk.cumsum(1) - by_risk / 2


def _higher(by_risk: Tensor) -> Tensor:
    """Returns for each risk the sum over higher risks, and half of that of the same risk."""
    return by_risk.sum(1, keepdim=True) - by_risk.cumsum(1) + by_risk / 2


def kaplan_meier(censored: Tensor, events: Tensor) -> Tensor:
    """Returns the share that has had no event at the end of each time bin, float64 [size].

    In a bin, events come before censoring (Kaplan and Meier 1958).

    Args:
        censored: number of censored examples in each time bin [size].
        events: number of events in each time bin [size].

    >>> kaplan_meier(torch.tensor([0, 1, 0, 0]), torch.tensor([2, 0, 0, 1])).tolist()
    [0.5, 0.5, 0.5, 0.0]
    """
    censored, events = censored.double(), events.double()
    there = _at_risk(censored, events)
    return _surviving(events, there)


def never_censored(censored: Tensor, events: Tensor) -> Tensor:
    """Returns the share that has not been censored at the end of each time bin, float64 [size]."""
    censored, events = censored.double(), events.double()
    # Who had the event in a bin can no longer be censored in it.
    return _surviving(censored, _at_risk(censored, events) - events)


def _at_risk(censored: Tensor, events: Tensor) -> Tensor:
    total = censored + events
    return total.flip(0).cumsum(0).flip(0)


def _surviving(lost: Tensor, there: Tensor) -> Tensor:
    # Nobody at risk: nothing changes.
    shares = torch.where(there > 0, 1 - lost / there.clamp_min(1), 1.0)
    return shares.cumprod(0)


def brier_scores(grid: Grid, counts: tuple[Tensor, Tensor], died: Tensor, alive: Tensor) -> Tensor:
    """Returns the Brier score at each edge, weighted for censoring, float64 [K].

    Graf et al. 1999: at time t, who had the event at T <= t counts with weight 1 / G(T-), who lives
    longer than t with 1 / G(t), and who was censored before counts 0. G is the share that has not
    been censored yet, by Kaplan and Meier.

    Args:
        grid: the bins of time.
        counts: number of censored examples and of events in each time bin, each [size].
        died: squares of the predicted survival at each edge, summed over the events of each time
            bin [size, K].
        alive: squares of 1 - survival at each edge, summed over the examples with a later time [K].
    """
    censored, events = counts
    remain = never_censored(censored, events)
    before = torch.cat([remain.new_ones(1), remain[:-1]])
    # Where no event and nobody is left, the share may be 0, and there is nothing to weigh.
    weighted = torch.where(died > 0, died / before[:, None], 0.0)
    of_died = grid.at_edges(weighted.cumsum(0)).diagonal()
    of_alive = torch.where(alive > 0, alive / grid.at_edges(remain), 0.0)
    return (of_died + of_alive) / (censored + events).sum()


def integrated(scores: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Returns the mean of a score over time from 0 to the last edge, by the trapezoid rule.

    Args:
        scores: score at each edge [K]; at time 0, where everyone lives, it is 0.
        edges: the times of the scores.

    >>> float(integrated(torch.tensor([0.25, 0.5]), (1.0, 2.0)))
    0.25
    """
    times = torch.tensor((0.0, *edges), dtype=torch.float64)
    values = torch.cat([torch.zeros(1, dtype=torch.float64), scores.double().cpu()])
    return torch.trapezoid(values, times) / times[-1]
