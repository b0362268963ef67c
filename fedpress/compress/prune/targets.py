"""Defines the cost that a pruned network should have: parameters, multiply-adds, bytes, latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log, prod

from torch import nn

from fedpress.compress.prune.graph import ChannelGraph
from fedpress.errors import RecipeError

Cost = Callable[[Sequence[int]], float]
"""Maps the number of channels that each layer keeps to a cost, such as parameters.

More channels never cost less.
"""


@dataclass(frozen=True)
class Target:
    """The cost that a pruned network should have.

    Attributes:
        key: name of the setting, for errors, such as "keep_params".
        cost: the cost as a function of the widths (the number of channels that each layer keeps).
        wanted: the wanted cost, for instance 300,000 parameters.
        limit: whether `wanted` is an upper limit; otherwise it should be met within a tolerance.
        full_cost: the cost that counts as 100% in messages; None for the cost of the network before
            this pruning.
    """

    key: str
    cost: Cost
    wanted: float
    limit: bool = False
    full_cost: float | None = None

    def miss(self, kept: Sequence[int]) -> float:
        """Returns the distance of the cost from `wanted`; infinity above a limit."""
        excess = self.cost(kept) - self.wanted
        if self.limit and excess > 0:
            return float("inf")
        return abs(excess)


def parameter_target(graph: ChannelGraph, share: float) -> Target:
    """Returns the target to keep `share` of the parameters.

    Raises:
        RecipeError: if `share` is not above 0 and at most 1.
    """
    _check_share("keep_params", share)
    dense = graph.parameters(full_widths(graph))
    return Target("keep_params", graph.parameters, share * dense)


def macs_target(graph: ChannelGraph, share: float) -> Target:
    """Returns the target to keep `share` of the multiply-adds of one example.

    Raises:
        RecipeError: if `share` is not above 0 and at most 1.
    """
    _check_share("keep_macs", share)
    dense = graph.macs(full_widths(graph))
    return Target("keep_macs", graph.macs, share * dense)


def bytes_target(model: nn.Module, graph: ChannelGraph, limit: int) -> Target:
    """Returns the target of at most `limit` bytes for all parameters and saved buffers.

    Bytes are counted as in `fedpress.compress.state_bytes`.

    Raises:
        RecipeError: if `limit` is below 1.
    """
    if limit < 1:
        raise RecipeError(f"got {limit}, expected a number of bytes above 0", place="max_bytes")
    return Target("max_bytes", bytes_of(model, graph), limit, limit=True)


def bytes_of(model: nn.Module, graph: ChannelGraph) -> Cost:
    """Returns the function from widths to the bytes of all parameters and saved buffers.

    A shared tensor counts once.
    """
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
                # Buffers that are not saved, and later names of shared tensors, do not count.
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
    """Returns the share of the parameters to try next, in a search for a latency of `wanted`.

    A measured cost, such as latency, cannot be computed from widths. So the caller prunes,
    measures, adds (share, cost) to `tried` and calls this function again. The cost is modelled as
    c * share^p between the nearest measurements above and below `wanted`. If no measurement is
    below, p comes from the two smallest shares above (p = 1 if there is only one share).

    Args:
        tried: shares in (0, 1] and their measured costs, including the unpruned network (1.0,
            cost).
        wanted: the cost to reach, above 0.
        tries: largest number of shares to try, besides 1.0.
        tolerance: a cost is accepted if it is below `wanted` by at most this share.

    Returns:
        The share; None if a share in `tried` is accepted, all tries are used, or the unpruned
        network is cheap enough.

    >>> round(next_share([(1.0, 8.0)], 4.0), 4)
    0.4875
    >>> next_share([(1.0, 8.0), (0.4875, 3.95)], 4.0) is None
    True
    """
    # A cost of exactly `wanted` is low enough.
    below = [(share, cost) for share, cost in tried if cost <= wanted]
    if len(tried) > tries or any(cost >= (1 - tolerance) * wanted for _, cost in below):
        return None
    # The smallest share that is still too expensive comes first.
    above = sorted((share, cost) for share, cost in tried if cost > wanted)
    if not above:
        return None
    high, cost_high = above[0]
    low, cost_low = max((pair for pair in below if pair[0] < high), default=(0.0, 0.0))

    # Aims at the middle of the accepted range, to allow for noise in the measurement.
    log_factor = log((1 - tolerance / 2) * wanted / cost_high)
    if low and cost_low > 0:
        # Interpolation, at least 10% away from both ends: a point near a known one adds little.
        part = min(max(log_factor / log(cost_low / cost_high), 0.1), 0.9)
        return exp((1 - part) * log(high) + part * log(low))
    if len(above) == 1:
        return high * max(exp(log_factor), 0.1)

    power = log(above[1][1] / cost_high) / log(above[1][0] / high)
    power = min(max(power, 0.25), 4.0)  # noise in two close measurements may give any power
    # Extrapolation goes 1.5 times as far as the model says, since part of the cost does not depend
    # on the share. A result below `wanted` is useful too: the next step can then interpolate.
    return high * max(exp(1.5 * log_factor / power), 0.1)


def _check_share(key: str, share: float) -> None:
    """Raises an error for a share that is not above 0 and at most 1."""
    if not 0 < share <= 1:
        raise RecipeError(
            f"got {share}, expected a share above 0 and at most 1",
            place=key,
            cure="try 0.3",
        )
