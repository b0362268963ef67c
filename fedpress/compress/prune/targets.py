"""What a cut has to come down to: parameters, multiply-adds, bytes or milliseconds, as a cost of the widths."""

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
    """`wanted` of a `cost`, reached within a tolerance or, for a `limit`, never passed.

    Attributes:
        key: the setting it comes from, for errors.
        cost: of the widths.
        wanted: in units of the cost.
        limit: whether `wanted` is a limit.
        full_cost: the cost that shares are told of; None: that of the network before this cut.
    """

    key: str
    cost: Cost
    wanted: float
    limit: bool = False
    full_cost: float | None = None

    def miss(self, kept: Sequence[int]) -> float:
        """Returns how far from `wanted` the widths are; above a limit infinitely."""
        over = self.cost(kept) - self.wanted
        return float("inf") if self.limit and over > 0 else abs(over)


def parameter_target(graph: ChannelGraph, share: float) -> Target:
    """Keeps `share` of the parameters.

    Raises:
        RecipeError: if it is not above 0 and at most 1.
    """
    return Target(
        "keep_params",
        graph.parameters,
        _checked("keep_params", share) * graph.parameters(full_widths(graph)),
    )


def macs_target(graph: ChannelGraph, share: float) -> Target:
    """Keeps `share` of the multiply-adds of one example.

    Raises:
        RecipeError: if it is not above 0 and at most 1.
    """
    return Target(
        "keep_macs", graph.macs, _checked("keep_macs", share) * graph.macs(full_widths(graph))
    )


def bytes_target(model: nn.Module, graph: ChannelGraph, limit: int) -> Target:
    """Lets all parameters and saved buffers of `model` take at most `limit` bytes, as `state_bytes` counts them.

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
    saved = model.state_dict(keep_vars=True)
    for name, tensor in saved.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            shapes[name], width[name] = tuple(tensor.shape), tensor.element_size()
    slices = [[s for s in group.slices if s.tensor in shapes] for group in graph.groups]

    def cost(kept: Sequence[int]) -> float:
        sizes = {name: list(shape) for name, shape in shapes.items()}
        for group, own, keep in zip(graph.groups, slices, kept, strict=True):
            for s in own:
                sizes[s.tensor][s.axis] -= (group.channels - keep) * s.index.shape[1]
        return sum(prod(size) * width[name] for name, size in sizes.items())

    return cost


def full_widths(graph: ChannelGraph) -> list[int]:
    """Returns the widths of the uncut network."""
    return [group.channels for group in graph.groups]


def next_share(
    tried: Sequence[tuple[float, float]], wanted: float, *, tries: int = 5, tolerance: float = 0.05
) -> float | None:
    """Says which share of the parameters to try next, so that a measured cost comes down to `wanted`.

    The caller cuts, measures, adds (share, cost) to `tried` and asks again: costs that are measured cannot be computed
    from widths. The cost is taken for a power of the share between the nearest costs above and below, or, while none
    is below, from the two lowest above.

    Args:
        tried: shares in (0, 1] and their costs, the whole network (1.0, cost) among them.
        wanted: the cost to come down to, above 0.
        tries: shares to try at most, besides the whole network.
        tolerance: how far below `wanted` is near enough, as a share of it.

    Returns:
        The share; None when one of those tried is near enough, all tries are used, or the whole network costs less.

    >>> round(next_share([(1.0, 8.0)], 4.0), 4)
    0.4875
    >>> next_share([(1.0, 8.0), (0.4875, 3.95)], 4.0) is None
    True
    """
    below = [(share, cost) for share, cost in tried if cost <= wanted]
    if len(tried) > tries or any(cost >= (1 - tolerance) * wanted for _, cost in below):
        return None
    above = sorted((share, cost) for share, cost in tried if cost > wanted)
    if not above:
        return None
    high, cost_high = above[0]
    low, cost_low = max((pair for pair in below if pair[0] < high), default=(0.0, 0.0))
    aim = log((1 - tolerance / 2) * wanted / cost_high)
    if low and cost_low > 0:
        part = min(max(aim / log(cost_low / cost_high), 0.1), 0.9)
        return exp((1 - part) * log(high) + part * log(low))
    if len(above) == 1:
        return high * max(exp(aim), 0.1)
    power = log(above[1][1] / cost_high) / log(above[1][0] / high)
    # Half as far again: part of the cost does not go with the share, and to have one below says more than one above.
    return high * max(exp(1.5 * aim / min(max(power, 0.25), 4.0)), 0.1)


def _checked(key: str, share: float) -> float:
    if not 0 < share <= 1:
        raise RecipeError(
            f"got {share}, expected a share above 0 and at most 1",
            place=key,
            cure="try 0.3",
        )
    return share
