"""Survival: predicts when an event happens, from times that may be censored."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import JsonValue
from torch import Tensor

from fedpress.errors import DataError, RecipeError
from fedpress.tasks import censored
from fedpress.tasks.base import Metric, Reduction, Sums, Task, check_numbers, json_number, reduced

INTERVALS = 10
"""Number of intervals if the recipe gives neither `edges` nor `intervals`."""


@dataclass(frozen=True)
class Survival(Task):
    """Time until an event, in K intervals: outputs [n, K] are logits of hazards.

    Targets are float32 [n, 2]: a time of at least 0, and 1 if the event happened then, or 0 if the
    time is censored: the event did not happen until then, and nothing is known of later. The hazard
    of an interval is the probability that the event happens in it, given that it did not happen
    before. So each interval is a yes or no, and the loss is the log-likelihood of all of them up to
    the known time (Gensheimer and Narasimhan 2019, "A scalable discrete-time survival model for
    neural networks", PeerJ 7:e6257). As there, a censored example survived an interval if it was
    seen for at least half of it. What happens after the last edge counts as survived.

    Attributes:
        names: names of the two columns of the targets, such as ("months", "died").
        intervals: number K of intervals, if `edges` are not given; then edges are quantiles of the
            public event times.
        edges: ends of the K intervals, ascending. The first interval begins at 0. An interval
            holds its end: a death in month 6 belongs to the interval that ends with 6.
        curve: share of the public examples without an event at each edge (Kaplan-Meier), as a
            baseline for the metrics; empty if there are no public targets.

    >>> task = Survival(("months", "died"), edges=(6.0, 12.0))
    >>> hazards = torch.tensor([[0.5, 0.5]])
    >>> task.probabilities(hazards.logit()).tolist()  # to live longer than 6 and 12 months
    [[0.5, 0.25]]
    >>> task.answers(hazards.logit()).tolist()  # median, and mean within 12 months
    [[6.0, 6.75]]
    """

    names: tuple[str, ...]
    intervals: int = INTERVALS
    edges: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()

    kind = "survival"
    targets = "numbers"
    shown_metrics = (
        Metric(
            "concordance",
            "concordance",
            meaning="share of comparable pairs in which the one with the earlier event has the "
            "higher risk; 0.5 is chance",
        ),
        Metric(
            "brier",
            "integrated Brier score",
            "lower",
            meaning="mean over time of the squared error of the survival curve, weighted for "
            "censoring",
        ),
        Metric(
            "brier_of_everyone",
            "Brier score of one curve",
            "lower",
            meaning="integrated Brier score if everyone gets the public Kaplan-Meier curve",
        ),
        Metric("loss", "loss", "lower"),
    )
    other_keys = (
        "brier_by_edge",
        "survival_by_edge",
        "kaplan_meier_by_edge",
        "edges",
        "concordance_warning",
        "concordance_error",
    )

    def __post_init__(self) -> None:
        if len(self.names) != 2:
            raise DataError(
                f"{len(self.names)} target columns ({', '.join(self.names)}), but the task "
                "survival needs two: time and event",
                place="label_column",
                cure='name both, time first, such as ["months", "died"]',
            )
        edges = tuple(map(float, self.edges))
        object.__setattr__(self, "edges", edges)
        _check_intervals(self.intervals, edges)
        if len(self.curve) not in (0, len(edges)):
            raise DataError(
                f"{len(edges)} edges, but a curve of {len(self.curve)} values",
                place="task 'survival'",
                cure="give one value for each edge",
            )

    @classmethod
    def fit(cls, names: tuple[str, ...], public: Tensor) -> Survival:
        """Creates the task with intervals between quantiles of the public event times."""
        return cls.made(names, public, {})

    @classmethod
    def made(cls, names: tuple[str, ...], public: Tensor, options: Mapping[str, Any]) -> Survival:
        """Creates the task with the user's edges, or with quantiles of the public event times.

        Raises:
            DataError: if edges are not given, and the public event times are too few for them.
        """
        task = cls(names, **options)
        if len(public):
            task.check_targets(public)
        edges = task.edges
        if not edges:
            edges = _quantiles(public, task.intervals, asked="intervals" in options)
        elif "intervals" in options and task.intervals != len(edges):
            raise RecipeError(
                f"{len(edges)} edges, but intervals = {task.intervals}",
                place="task.intervals",
                cure="leave it out: edges say how many there are",
            )
        curve = task.curve
        if len(public) and not curve:
            curve = _kaplan_meier_at(edges, public)
        return cls(names, len(edges), edges, curve)

    @property
    def outputs(self) -> int:
        """Number of intervals."""
        return len(self.edges) or self.intervals

    @property
    def _grid(self) -> censored.Grid:
        return censored.Grid(self.edges)

    def loss(self, outputs: Tensor, targets: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Returns the negative log-likelihood of an example's intervals up to its time, in nats."""
        ends = targets.new_tensor(self.edges)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        time, event = targets[:, :1], targets[:, 1:] == 1
        # A time of 0 belongs to the first interval.
        happened = event & (time <= ends) & ((time > starts) | (starts == 0))
        survived = torch.where(event, time > ends, time >= (starts + ends) / 2)
        counted = (happened | survived).to(targets.dtype)
        each = F.binary_cross_entropy_with_logits(
            outputs.float(), happened.to(targets.dtype), weight=counted, reduction="none"
        )
        return reduced(each.sum(1), reduction)

    def soft_loss(self, outputs: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Returns T^2 times the cross-entropy with the teacher's hazards at temperature T."""
        soft = (teacher / temperature).sigmoid()
        loss = F.binary_cross_entropy_with_logits(outputs / temperature, soft)
        return loss * temperature**2

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Returns the survival curve: the probability of no event until each edge, [n, K]."""
        return (-F.softplus(outputs).cumsum(1)).exp()

    @property
    def probability_names(self) -> tuple[str, ...]:
        """What each probability is of, such as "months > 6"."""
        return tuple(f"{self.names[0]} > {edge:g}" for edge in self.edges)

    def answers(self, outputs: Tensor) -> Tensor:
        """Returns median and mean time, [n, 2]; between edges the survival curve is a line.

        The median is infinite if the curve stays above one half. The mean is that of the time until
        the last edge, which is always known (restricted mean survival time, Royston and Parmar
        2013).
        """
        curve = self.probabilities(outputs)
        return torch.stack([self._median(curve), self._mean(curve)], 1)

    @property
    def answer_names(self) -> tuple[str, ...]:
        """Names of the two answers, such as "median months" and "mean months until 60"."""
        time = self.names[0]
        return f"median {time}", f"mean {time} until {self.edges[-1]:g}"

    def _points(self, curve: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the times 0 and edges [K + 1], and the survival at them [n, K + 1]."""
        times = curve.new_tensor((0.0, *self.edges))
        return times, torch.cat([torch.ones_like(curve[:, :1]), curve], 1)

    def _median(self, curve: Tensor) -> Tensor:
        times, points = self._points(curve)
        below = curve <= 0.5
        at = below.to(torch.uint8).argmax(1, keepdim=True)  # the first one
        high, low = points.gather(1, at)[:, 0], points.gather(1, at + 1)[:, 0]
        start, end = times[at[:, 0]], times[at[:, 0] + 1]
        found = start + (high - 0.5) / (high - low) * (end - start)
        found = torch.where(below.any(1), found, math.inf)
        return torch.where(curve.isnan().any(1), math.nan, found)

    def _mean(self, curve: Tensor) -> Tensor:
        times, points = self._points(curve)
        return torch.trapezoid(points, times)

    def _risk(self, curve: Tensor) -> Tensor:
        """Returns the risk of each example on the scale of logits: a shorter mean time is more."""
        return -(self._mean(curve) / self.edges[-1]).logit()

    def score_sums(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns the histograms for the concordance."""
        curve = self.probabilities(outputs.detach().double())
        known = ~curve.isnan().any(1)
        time, event = targets[known].unbind(1)
        # Nothing is predicted after the last edge, so everyone there is taken as censored at it.
        happened = (event == 1) & (time <= time.new_tensor(self.edges[-1]))
        bins = self._grid.bins(time)
        risks = self._risk(curve[known])
        return {"pairs": censored.pair_counts(self._grid, bins, happened, risks)}

    def score(self, sums: Sums) -> float:
        """Returns the concordance index."""
        return censored.concordance(sums["pairs"])[0]

    def metrics(self, outputs: Tensor, targets: Tensor) -> Sums:
        """Returns histograms of pairs, and sums for the Brier score at each edge."""
        curve = self.probabilities(outputs.detach().double())
        known = ~curve.isnan().any(1)
        curve = curve[known]
        time, event = targets[known].unbind(1)
        ends = time.new_tensor(self.edges)
        grid, later = self._grid, time[:, None] > ends
        happened = (event == 1) & ~later[:, -1]
        died = torch.zeros(grid.size, len(ends), dtype=torch.float64, device=curve.device)
        died.index_add_(0, grid.bins(time)[happened], curve[happened].square())
        return {
            **self.score_sums(outputs, targets),
            "died": died,
            "alive": ((1 - curve).square() * later).sum(0),
            "survival": curve.sum(0),
            "examples": torch.tensor(len(targets)),
            "broken": (~known).sum(),
        }

    def summary(self, sums: Sums) -> dict[str, JsonValue]:
        """Computes the metrics by key, and these further values.

        - `brier_by_edge`: Brier score at each edge.
        - `survival_by_edge`: mean predicted survival at each edge.
        - `kaplan_meier_by_edge`: observed survival at each edge, for comparison.
        - `edges`: the edges, so that a reader of the result knows the times.
        - `concordance_warning`: a sentence if outputs are NaN, or the model is no better than
          chance or than one curve for everyone; else None.
        - `concordance_error`: standard error of the concordance.
        """
        grid = self._grid
        index, error = censored.concordance(sums["pairs"])
        by_bin = sums["pairs"].sum(2)
        counts = by_bin[0], by_bin[1]
        known = by_bin.sum()
        scores = censored.brier_scores(grid, counts, sums["died"], sums["alive"])
        observed = grid.at_edges(censored.kaplan_meier(*counts))
        found: dict[str, JsonValue] = {
            "concordance": json_number(index),
            "brier": json_number(censored.integrated(scores, self.edges)),
            "brier_of_everyone": self._brier_of_everyone(counts),
            "brier_by_edge": [json_number(value) for value in scores],
            "survival_by_edge": [json_number(value) for value in sums["survival"] / known],
            "kaplan_meier_by_edge": [json_number(value) if known else None for value in observed],
            "edges": list(self.edges),
            "concordance_error": error,
        }
        return found | {"concordance_warning": self._warning(found, sums)}

    def _brier_of_everyone(self, counts: tuple[Tensor, Tensor]) -> float | None:
        """Returns the integrated Brier score of the public Kaplan-Meier curve for everyone."""
        if not self.curve:
            return None
        censored_at, events = (count.double() for count in counts)
        curve = events.new_tensor(self.curve)
        both = censored_at + events
        later = both.sum() - self._grid.at_edges(both.cumsum(0))
        died = events[:, None] * curve.square()
        scores = censored.brier_scores(self._grid, counts, died, later * (1 - curve).square())
        return json_number(censored.integrated(scores, self.edges))

    def _warning(self, found: Mapping[str, Any], sums: Sums) -> str | None:
        """Returns a sentence if the model is useless, else None."""
        n, broken = int(sums["examples"]), int(sums["broken"])
        index, brier, simple = (found[k] for k in ("concordance", "brier", "brier_of_everyone"))
        if broken:
            return f"the model's outputs are not numbers (NaN) on {broken:,} of {n:,} test examples"
        if index is None:
            return "no two test examples can be compared, so the concordance is unknown"
        if index <= 0.5:
            return f"with a concordance of {index:.3f} the model is no better than chance (0.5)"
        if brier is not None and simple is not None and brier >= simple:
            return (
                f"with an integrated Brier score of {brier:.4g} the model is no better than the "
                f"same survival curve for everyone ({simple:.4g})"
            )
        return None

    def check_targets(self, targets: Tensor) -> None:
        """Checks that targets are times of at least 0 and events of 0 or 1, float32 [n, 2].

        Raises:
            DataError: if they are not.
        """
        check_numbers(targets, 2, self.kind)
        time, event = self.names
        if bool((targets[:, 0] < 0).any()):
            raise DataError(
                f"some times are negative ('{time}')",
                place="targets",
                cure="leave out those rows; label_column names the time first, then the event",
            )
        if not bool(((targets[:, 1] == 0) | (targets[:, 1] == 1)).all()):
            raise DataError(
                f"some events are not 0 or 1 ('{event}')",
                place="targets",
                cure="give 1 where the event happened and 0 where it was not seen; label_column "
                "names the time first, then the event",
            )

    def made_up_targets(self, n: int, like: Tensor) -> Tensor:
        """Returns times from 0 to the last edge, with an event for every other one, [n, 2]."""
        times = torch.linspace(0, 1, n) * self.edges[-1]
        return torch.stack([times, torch.arange(n) % 2], 1).to(like.dtype)

    def example_targets(self, outputs: Tensor) -> Tensor:
        """Returns zeros [n, 2]."""
        return torch.zeros(len(outputs), 2)

    def to_json(self) -> dict[str, JsonValue]:
        """Returns names, edges and curve.

        A device computes the survival at edge k as the product of `1 - sigmoid(output)` up to k.
        """
        told: dict[str, JsonValue] = {"edges": list(self.edges), "curve": list(self.curve)}
        return {**super().to_json(), "intervals": len(self.edges), **told}


def _check_intervals(intervals: int, edges: tuple[float, ...]) -> None:
    """Refuses fewer than two intervals, and edges that are not ascending numbers above 0."""
    if isinstance(intervals, bool) or intervals != int(intervals):
        raise TypeError(f"intervals = {intervals} is no whole number")
    if (len(edges) or intervals) < 2:
        raise RecipeError(
            "one interval has no survival curve",
            place="task.edges" if edges else "task.intervals",
            cure='give two or more, or take the task "binary"',
        )
    after_zero = all(math.isfinite(edge) and edge > 0 for edge in edges)
    if not after_zero or any(a >= b for a, b in itertools.pairwise(edges)):
        raise RecipeError(
            f"edges = {list(edges)} are not ascending numbers above 0",
            place="task.edges",
            cure="give the ends of the intervals; the first one begins at 0",
        )


def _quantiles(public: Tensor, intervals: int, *, asked: bool) -> tuple[float, ...]:
    """Returns the quantiles 1/K, 2/K, ..., 1 of the public event times, each once.

    Args:
        public: public targets [n, 2].
        intervals: number K.
        asked: whether the user asked for so many, so that fewer are an error.

    Raises:
        DataError: if there are too few different event times.
    """
    times = public[public[:, 1] == 1, 0].double() if len(public) else torch.zeros(0)
    given = "task = { kind = 'survival', edges = [6, 12, 24] }, in the unit of the times"
    if not len(times):
        raise DataError(
            "no public row has an event, so the intervals are unknown",
            place="task.edges",
            cure=f"give them: {given}",
        )
    # Nearest ranks: each edge is a time that was seen, with the digits of the data.
    ranks = -(-torch.arange(1, intervals + 1) * len(times) // intervals)
    edges = times.sort().values[ranks - 1].unique()
    edges = edges[edges > 0]
    if len(edges) < (intervals if asked else 2):
        fewer = (
            f"set intervals = {len(edges)}, or give edges: " if len(edges) > 1 else "give edges: "
        )
        raise DataError(
            f"the public event times give only {len(edges)} different quantiles for {intervals} "
            "intervals",
            place="task.intervals",
            cure=fewer + given,
        )
    return tuple(edges.tolist())


def _kaplan_meier_at(edges: tuple[float, ...], targets: Tensor) -> tuple[float, ...]:
    grid = censored.Grid(edges)
    bins, events = grid.bins(targets[:, 0]), targets[:, 1] == 1
    of_censored = bins[~events].bincount(minlength=grid.size)
    of_events = bins[events].bincount(minlength=grid.size)
    return tuple(grid.at_edges(censored.kaplan_meier(of_censored, of_events)).tolist())
