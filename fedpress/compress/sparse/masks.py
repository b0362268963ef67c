"""From scores to masks: the entries that stay, counted exactly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, prod
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.compress.sparse.patterns import Pattern, n_of_m
from fedpress.compress.sparse.weights import Weight
from fedpress.errors import ModelError, RecipeError
from fedpress.nn.quantized import kept_entries

Scope = Literal["global", "uniform", "erk"]
Masks = dict[str, Tensor]
"""Weight name -> bool of its shape, true where it is kept."""


def choose(
    weights: Sequence[Weight],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    *,
    density: float,
    scope: Scope | Mapping[str, float] = "global",
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Keeps the highest scores, so that `density` of all entries of `weights` stay: exactly round(density * entries).

    A unit of several entries (block, filter, channel) is worth the mean of its scores; then the count is the nearest
    that whole units reach. Of equal scores the first stays. Every weight keeps at least one unit.

    Args:
        weights: that share the budget.
        scores: by name, of the weights' shapes.
        pattern: what goes together. N:M keeps at least N of M in every group, more where `density` asks for more.
        density: share of the entries that stays, in (0, 1].
        scope: "global" orders all weights together; "uniform" keeps the same share of each; "erk" keeps more of small
            weights (Evci et al. 2020, section 3.2); or the density of each weight by name, scaled to the budget.
        within: entries that may stay, by name; an earlier mask.

    Raises:
        RecipeError: if `density` is out of range, or more than `within` leaves.
        ModelError: if a score is not a number.
    """
    check_density(density)
    allowed = {w.name: _allowed(w, within) for w in weights}
    total, left = sum(w.size for w in weights), sum(int(a.sum()) for a in allowed.values())
    wanted = round(density * total)
    if wanted > left and pattern.kind != "n:m":
        raise RecipeError(
            f"got {density:g}, but only {left / total:.4g} of these weights are left",
            place="density",
            cure="give less",
        )
    wanted = max(wanted, sum(bool(a.any()) for a in allowed.values()))
    flat = {w.name: _checked(w, scores[w.name]) for w in weights}
    if pattern.kind == "n:m":
        n = max(pattern.a, min(pattern.b, ceil(density * pattern.b)))
        return {w.name: _n_of_m(w, flat[w.name], allowed[w.name], n, pattern.b) for w in weights}
    units = [_Units.of(w, pattern, flat[w.name], allowed[w.name]) for w in weights]
    if scope == "global":
        kept = _global(units, wanted)
    else:
        budgets = share_out(weights, allowed, wanted, scope)
        kept = [_fill(u.value, u.cost, budget) for u, budget in zip(units, budgets, strict=True)]
    masks: Masks = {}
    for weight, own, best in zip(weights, units, kept, strict=True):
        masks[weight.name] = own.mask(best, allowed[weight.name])
    return masks


def check_density(density: float, *, where: str = "density") -> None:
    """Refuses a share that is not above 0 and at most 1.

    Raises:
        RecipeError: if it is out of range.
    """
    if not 0 < density <= 1:
        raise RecipeError(
            f"got {density}, expected a share above 0 and at most 1", place=where, cure="try 0.1"
        )


def share_out(
    weights: Sequence[Weight],
    allowed: Mapping[str, Tensor],
    wanted: int,
    scope: str | Mapping[str, float],
) -> list[int]:
    """Deals `wanted` entries to the weights: in proportion to the scope's densities, none above what it may keep.

    What a full weight cannot take goes to the others. Whole numbers by largest remainder, so their sum is `wanted`.
    """
    if isinstance(scope, str):
        density = {w.name: 1.0 if scope == "uniform" else _erk(w.value.shape) for w in weights}
    else:
        density = {w.name: _density_given(scope, w.name) for w in weights}
    shares = [density[w.name] * w.size for w in weights]
    room = [int(allowed[w.name].sum()) for w in weights]
    return _whole_numbers(_in_proportion(shares, room, wanted), room, wanted)


def _in_proportion(shares: Sequence[float], room: Sequence[int], wanted: int) -> list[float]:
    """Deals `wanted` in proportion to `shares`; what goes beyond the room of one is dealt to the others."""
    full: set[int] = set()
    while True:
        free = [i for i in range(len(shares)) if i not in full]
        left = wanted - sum(room[i] for i in full)
        scale = left / sum(shares[i] for i in free) if free else 0.0
        dealt = [float(room[i]) if i in full else shares[i] * scale for i in range(len(shares))]
        over = [i for i in free if dealt[i] > room[i]]
        if not over:
            return dealt
        full.update(over)


def _whole_numbers(exact: Sequence[float], room: Sequence[int], wanted: int) -> list[int]:
    """Rounds to whole numbers by largest remainder, so that their sum is `wanted`."""
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    open_ = [i for i in by_remainder if counts[i] < room[i]]
    for i in open_[: wanted - sum(counts)]:
        counts[i] += 1
    # A weight without any entry would cut the network: it takes one from the largest.
    for i in [i for i, n in enumerate(counts) if n < min(1, room[i])]:
        largest = counts.index(max(counts))
        counts[i], counts[largest] = 1, max(counts) - 1
    return counts


def _erk(shape: Sequence[int]) -> float:
    """Density of an Erdos-Renyi kernel, up to a factor: the sum of a weight's sides over their product."""
    return sum(shape) / prod(shape)


def _density_given(densities: Mapping[str, float], name: str) -> float:
    if name not in densities:
        raise RecipeError(
            f"'{name}' has none",
            place="scope",
            cure="give one for each weight that gets zeros",
        )
    check_density(densities[name], where=f"scope.{name}")
    return densities[name]


class _Units:
    """What goes together in one weight: what each unit costs (entries) and is worth (mean score)."""

    def __init__(self, ids: Tensor | None, value: Tensor, cost: Tensor) -> None:
        self.ids, self.value, self.cost = ids, value, cost

    @classmethod
    def of(cls, weight: Weight, pattern: Pattern, scores: Tensor, allowed: Tensor) -> _Units:
        if pattern.kind == "unstructured":
            value = scores.flatten().masked_fill(~allowed.flatten(), -torch.inf)
            return cls(None, value, allowed.flatten().long())
        ids = pattern.units(weight).to(scores.device)
        flat, count, may = ids.flatten(), int(ids.max()) + 1, allowed.flatten()
        cost = torch.zeros(count, dtype=torch.long, device=flat.device)
        cost.index_add_(0, flat, may.long())
        total = torch.zeros(count, dtype=torch.double, device=flat.device)
        total.index_add_(0, flat, scores.flatten().double().masked_fill(~may, 0.0))
        return cls(ids, (total / cost).masked_fill(cost == 0, -torch.inf), cost)

    def mask(self, kept: Tensor, allowed: Tensor) -> Tensor:
        entries = kept.view(allowed.shape) if self.ids is None else kept[self.ids]
        return entries & allowed


def _global(units: Sequence[_Units], wanted: int) -> list[Tensor]:
    """Fills one budget from all weights together; the best unit of each comes first, so that no layer is cut off."""
    values, least = [], 0
    for one in units:
        value = one.value.cpu().clone()
        best = int(value.argmax())
        value[best] = torch.inf
        least += int(one.cost[best])
        values.append(value)
    kept = _fill(torch.cat(values), torch.cat([u.cost.cpu() for u in units]), max(wanted, least))
    parts = kept.split([len(u.value) for u in units])
    return [part.to(u.value.device) for part, u in zip(parts, units, strict=True)]


def _fill(value: Tensor, cost: Tensor, wanted: int) -> Tensor:
    """Keeps the most valuable units, as many as bring their cost nearest to `wanted`, at least one; bool [units]."""
    order = value.argsort(descending=True, stable=True)
    spent = cost[order].cumsum(0)
    # The first `count` cost less than wanted.
    count = int(torch.searchsorted(spent, spent.new_tensor(wanted)))
    before = int(spent[count - 1]) if count else 0
    if count < len(spent) and (not count or int(spent[count]) - wanted <= wanted - before):
        count += 1
    kept = torch.zeros_like(value, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def _n_of_m(weight: Weight, scores: Tensor, allowed: Tensor, n: int, m: int) -> Tensor:
    return n_of_m(scores.masked_fill(~allowed, -torch.inf), weight, n, m) & allowed


def _allowed(weight: Weight, within: Mapping[str, Tensor] | None) -> Tensor:
    if within is not None and weight.name in within:
        return within[weight.name]
    return torch.ones(weight.value.shape, dtype=torch.bool, device=weight.value.device)


def _checked(weight: Weight, scores: Tensor) -> Tensor:
    if scores.isnan().any():
        raise ModelError(
            f"'{weight.name}' has scores that are no numbers",
            place="scores",
            cure="use a model that trained well",
        )
    return scores.detach().to(weight.value.device)


@torch.no_grad()
def apply_(weights: Iterable[Weight], masks: Mapping[str, Tensor]) -> None:
    """Zeroes the entries of `weights` that their masks do not keep."""
    for weight in weights:
        weight.value.masked_fill_(~masks[weight.name], 0)


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Returns the share of entries that stay.

    >>> density_of({"w": torch.tensor([True, False])})
    0.5
    """
    return sum(int(m.sum()) for m in masks.values()) / max(
        1, sum(m.numel() for m in masks.values())
    )


def masks_of(model: nn.Module, names: Iterable[str]) -> Masks:
    """Reads the masks that the zeros of the named parameters are (see `ModelSpec.sparse`)."""
    return kept_entries(model, names)
