"""Targets of pruning: parameters, multiply-adds, bytes or milliseconds, as a cost of the widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, prod

from torch import nn

from fedpress.compress.prune.graph import ChannelGraph
from fedpress.errors import RecipeError

Cost = Callable[[Sequence[int]], float]
"""Takes the number of channels that each layer keeps; more channels never cost less."""


@dataclass(frozen=True)
class Target:
    """A cost to come down to: reached within a tolerance or, for a `limit`, never exceeded.

    Attributes:
        key: the setting it comes from, for errors.
        cost: of the widths.
        wanted: in units of the cost.
        limit: whether `wanted` must not be exceeded.
        full_cost: the cost that shares in messages refer to; None: that of the network before this
            pruning.
    """

    key: str
    cost: Cost
    wanted: float
    limit: bool = False
    full_cost: float | None = None

    def miss(self, kept: Sequence[int]) -> float:
        """Returns how far the widths are from `wanted`: infinity above a limit."""
        excess = self.cost(kept) - self.wanted
        if self.limit and excess > 0:
            return float("inf")
        return abs(excess)


def parameter_target(graph: ChannelGraph, share: float) -> Target:
    """Keeps `share` of the parameters.

    Raises:
        RecipeError: if it is not above 0 and at most 1.
    """
    _check_share("keep_params", share)
    dense = graph.parameters(full_widths(graph))
    return Target("keep_params", graph.parameters, share * dense)


def macs_target(graph: ChannelGraph, share: float) -> Target:
    """Keeps `share` of the multiply-adds of one example.

    Raises:
        RecipeError: if it is not above 0 and at most 1.
    """
    _check_share("keep_macs", share)
    dense = graph.macs(full_widths(graph))
    return Target("keep_macs", graph.macs, share * dense)


def bytes_target(model: nn.Module, graph: ChannelGraph, limit: int) -> Target:
    """Allows all parameters and saved buffers at most `limit` bytes, as `state_bytes` counts them.

    Raises:
        RecipeError: if it is below 1.
    """
    if limit < 1:
        raise RecipeError(f"got {limit}, expected a number of bytes above 0", place="max_bytes")
    return Target("max_bytes", bytes_of(model, graph), limit, limit=True)


def bytes_of(model: nn.Module, graph: ChannelGraph) -> Cost:
    """Returns the cost in bytes of all parameters and saved buffers, shared ones once."""
    shapes: dict[str, tuple[int, ...]] = {}
    width: dict[str, int] = {}
    seen: set[int] = set()
    # `keep_vars` returns the tensors themselves, by which shared ones are recognised.
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name] = tuple(tensor.shape)
            width[name] = tensor.element_size()

    def cost(kept: Sequence[int]) -> float:
        sizes = {name: list(shape) for name, shape in shapes.items()}
        for group, keep in zip(graph.groups, kept, strict=True):
            for s in group.slices:
                if s.tensor in sizes:
                    sizes[s.tensor][s.axis] -= (group.channels - keep) * s.index.shape[1]
        return sum(prod(size) * width[name] for name, size in sizes.items())

    return cost


def full_widths(graph: ChannelGraph) -> list[int]:
    """Returns the widths of the network before pruning."""
    return [group.channels for group in graph.groups]


def next_share(
    tried: Sequence[tuple[float, float]], wanted: float, *, tries: int = 5, tolerance: float = 0.05
) -> float | None:
    """Returns the share of the parameters to try next to bring a measured cost down to `wanted`.

    A cost that is measured, such as latency, cannot be computed from widths. So the caller prunes,
    measures, adds (share, cost) to `tried` and asks again. Between the nearest costs above and
    below, the cost is assumed to be a power of the share; while none is below, the power is that of
    the two lowest above.

    Args:
        tried: shares in (0, 1] and their costs, including the whole network (1.0, cost).
        wanted: the cost to come down to, above 0.
        tries: most shares to try, besides the whole network.
        tolerance: how far below `wanted` is accepted, as a share of it.

    Returns:
        The share; None if one of those tried is accepted, all tries are used, or the whole network
        costs less.

    >>> round(next_share([(1.0, 8.0)], 4.0), 4)
    0.4875
    >>> next_share([(1.0, 8.0), (0.4875, 3.95)], 4.0) is None
    True
    """
    # A cost of exactly `wanted` is fast enough.
    below = [(share, cost) for share, cost in tried if cost <= wanted]
    if len(tried) > tries or any(cost >= (1 - tolerance) * wanted for _, cost in below):
        return None
    # The smallest share that is still too expensive comes first.
    above = sorted((share, cost) for share, cost in tried if cost > wanted)
    if not above:
        return None
    high, cost_high = above[0]
    low, cost_low = max((pair for pair in below if pair[0] < high), default=(0.0, 0.0))

    # The middle of the accepted range, so that noise in the measurement does not miss it.
    log_factor = log((1 - tolerance / 2) * wanted / cost_high)
    if low and cost_low > 0:
        # Interpolation, kept away from both ends, where nothing new would be learned.
        part = min(max(log_factor / log(cost_low / cost_high), 0.1), 0.9)
        return exp((1 - part) * log(high) + part * log(low))
    if len(above) == 1:
        return high * max(exp(log_factor), 0.1)

    power = log(above[1][1] / cost_high) / log(above[1][0] / high)
    power = min(max(power, 0.25), 4.0)  # two close measurements may give any power
    # Part of the cost does not depend on the share, so this goes 1.5 times as far: a cost below
    # `wanted` allows interpolation next, one above does not.
    return high * max(exp(1.5 * log_factor / power), 0.1)


def _check_share(key: str, share: float) -> None:
    """Refuses a share that is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise RecipeError(
            f"got {share}, expected a share above 0 and at most 1",
            place=key,
            cure="try 0.3",
        )
