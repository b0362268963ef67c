"""Turns scores of weights into masks that keep a given share of all entries.

The share is called density: 0.1 keeps a tenth of the entries and sets the rest to zero.
"""

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

# How the kept entries are divided among the weights; see `masks_from_scores`.
Scope = Literal["global", "uniform", "erk"]
Masks = dict[str, Tensor]
"""Weight name -> bool tensor in its shape, true for kept entries."""


def masks_from_scores(
    weights: Sequence[Weight],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    *,
    density: float,
    scope: Scope | Mapping[str, float] = "global",
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Returns masks that keep the highest scores: round(density * entries) of all entries.

    A pattern such as "block" keeps or zeroes several entries together; such entries are a unit. The
    score of a unit is the mean over its entries, and the number of kept entries is the nearest that
    whole units allow. If scores are equal, the first units are kept. Every weight keeps at least
    one unit, unless `within` allows it no entry.

    Args:
        weights: the weights that share the budget.
        scores: scores by name, in the shapes of the weights.
        pattern: which entries are kept or zeroed together. N:M keeps N of every M inputs, or
            ceil(density * M) if that is more, or fewer where `within` allows fewer; it ignores
            `scope`.
        density: share of the entries to keep, in (0, 1].
        scope: "global" uses one threshold for all weights; "uniform" keeps the same share of each;
            "erk" keeps a larger share of small weights (Erdos-Renyi kernel, Evci et al. 2020,
            section 3.2). Or a dictionary with the density of each weight by name; these densities
            are scaled so that `density` of all entries are kept.
        within: an earlier mask of each weight, by name; only entries of this mask may be kept.

    Raises:
        RecipeError: if `density` is out of range, or asks for more entries than `within` has, or if
            `scope` has no valid density for a weight.
        ModelError: if a score is NaN.
    """
    check_density(density)
    allowed: Masks = {}
    checked: dict[str, Tensor] = {}
    total = available = 0
    for w in weights:
        allowed[w.name] = _allowed(w, within)
        total += w.size
        available += int(allowed[w.name].sum())
    wanted = round(density * total)
    # N:M keeps what an earlier mask leaves of each group, so it never asks for too many entries.
    if wanted > available and pattern.kind != "n:m":
        raise RecipeError(
            f"got {density:g}, but only {available / total:.4g} of these weights are left",
            place="density",
            cure="give a smaller share",
        )
    for w in weights:
        checked[w.name] = _check_scores(w, scores[w.name])
    if pattern.kind == "n:m":
        # A density above N / M keeps more of every group: gradual schedules reach N:M step by step.
        n = max(pattern.a, min(pattern.b, ceil(density * pattern.b)))
        return _n_of_m_masks(weights, checked, allowed, n, pattern.b)

    # One entry at least for each weight: a layer of zeros would pass on nothing.
    nonempty = [mask for mask in allowed.values() if bool(mask.any())]
    wanted = max(wanted, len(nonempty))
    units = []
    for w in weights:
        units.append(_Units.of(w, pattern, checked[w.name], allowed[w.name]))
    if scope == "global":
        kept = _fill_global(units, wanted)
    else:
        kept = []
        budgets = divide_budget(weights, allowed, wanted, scope)
        for own, budget in zip(units, budgets, strict=True):
            kept.append(_fill(own.value, own.cost, budget))
    masks: Masks = {}
    for weight, own, best in zip(weights, units, kept, strict=True):
        masks[weight.name] = own.mask(best, allowed[weight.name])
    return masks


def check_density(density: float, *, where: str = "density") -> None:
    """Checks that a density is above 0 and at most 1.

    Args:
        density: the share of entries to keep.
        where: name of the setting, for errors.

    Raises:
        RecipeError: if the density is out of range.
    """
    if not 0 < density <= 1:
        raise RecipeError(
            f"got {density}, expected a share above 0 and at most 1", place=where, cure="try 0.1"
        )


def divide_budget(
    weights: Sequence[Weight],
    allowed: Mapping[str, Tensor],
    wanted: int,
    scope: str | Mapping[str, float],
) -> list[int]:
    """Divides `wanted` entries among the weights, in proportion to density * size.

    If a weight would get more than its allowed entries, the excess is divided among the others.

    Args:
        weights: the weights to keep entries of.
        allowed: mask of the entries that each weight may keep.
        wanted: number of entries to keep in all weights together.
        scope: the densities: "uniform" (the same for all), "erk" (larger for small weights), or a
            density for each weight by name.

    Returns:
        The number of entries to keep of each weight. Their sum is `wanted`, or the number of
        allowed entries if that is smaller.

    Raises:
        RecipeError: if a weight has no density, or a density is out of range.
    """
    # A density times the size of the weight is its share of the budget, in entries.
    shares = []
    for w in weights:
        if not isinstance(scope, str):
            density = _density_given(scope, w.name)
        elif scope == "uniform":
            density = 1.0
        else:
            density = _erdos_renyi(w.value.shape)
        shares.append(density * w.size)
    most = [int(allowed[w.name].sum()) for w in weights]
    return _round_to_sum(_in_proportion(shares, most, wanted), most, wanted)


def _in_proportion(shares: Sequence[float], most: Sequence[int], wanted: int) -> list[float]:
    """Divides `wanted` in proportion to `shares`, but gives entry i at most `most[i]`."""
    full: set[int] = set()
    while True:
        free = [i for i in range(len(shares)) if i not in full]
        remaining = wanted - sum(most[i] for i in full)
        scale = remaining / sum(shares[i] for i in free) if free else 0.0
        amounts = [float(n) for n in most]
        exceeding = set()
        for i in free:
            amounts[i] = shares[i] * scale
            if amounts[i] > most[i]:
                exceeding.add(i)

        # Each round fills at least one weight, so this ends.
        if not exceeding:
            return amounts
        full |= exceeding


def _round_to_sum(exact: Sequence[float], most: Sequence[int], wanted: int) -> list[int]:
    """Rounds to integers with the sum `wanted`, by the largest-remainder method."""
    counts = [int(x) for x in exact]
    # The index breaks ties, so that the result is the same on every machine.
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    may_grow = [i for i in by_remainder if counts[i] < most[i]]
    for i in may_grow[: wanted - sum(counts)]:
        counts[i] += 1

    # A weight of zeros would cut the network in two, so it gets an entry of the largest weight.
    empty = [i for i, n in enumerate(counts) if n < min(1, most[i])]
    for i in empty:
        largest = counts.index(max(counts))
        counts[i] = 1
        counts[largest] -= 1
    return counts


def _erdos_renyi(shape: Sequence[int]) -> float:
    """Returns the density of the Erdos-Renyi kernel up to a factor: sum / product of the sizes."""
    return sum(shape) / prod(shape)


def _density_given(densities: Mapping[str, float], name: str) -> float:
    """Returns a weight's density from the user's table; raises an error if it is missing."""
    if name not in densities:
        raise RecipeError(
            f"the weight '{name}' has no density",
            place="scope",
            cure="give a density for each weight that may have zeros",
        )
    check_density(densities[name], where=f"scope.{name}")
    return densities[name]


class _Units:
    """The units of one weight: groups of entries that are kept or zeroed together.

    Attributes:
        ids: the unit of each entry, in the shape of the weight; None if every entry is a unit.
        value: [units], mean score of each unit.
        cost: [units], number of allowed entries in each unit.
    """

    def __init__(self, ids: Tensor | None, value: Tensor, cost: Tensor) -> None:
        self.ids = ids
        self.value = value
        self.cost = cost

    @classmethod
    def of(cls, weight: Weight, pattern: Pattern, scores: Tensor, allowed: Tensor) -> _Units:
        """Returns the units of `weight` by `pattern`; entries that are not allowed do not count."""
        flat_allowed = allowed.flatten()
        # Every entry is a unit: no sums over units are needed, which saves memory.
        if pattern.kind == "unstructured":
            value = scores.flatten().masked_fill(~flat_allowed, -torch.inf)
            return cls(None, value, flat_allowed.long())

        ids = pattern.units(weight).to(scores.device)
        flat_ids = ids.flatten()
        # Units without an allowed entry get the score -infinity below, so they are kept last.
        count = int(ids.max()) + 1
        cost = torch.zeros(count, dtype=torch.long, device=ids.device)
        cost.index_add_(0, flat_ids, flat_allowed.long())
        total = torch.zeros(count, dtype=torch.double, device=ids.device)
        total.index_add_(0, flat_ids, scores.flatten().double().masked_fill(~flat_allowed, 0.0))
        return cls(ids, (total / cost).masked_fill(cost == 0, -torch.inf), cost)

    def mask(self, kept: Tensor, allowed: Tensor) -> Tensor:
        """Returns the mask of the entries whose units are `kept` [units]."""
        entries = kept.view(allowed.shape) if self.ids is None else kept[self.ids]
        return entries & allowed


def _fill_global(units: Sequence[_Units], wanted: int) -> list[Tensor]:
    """Chooses the best units of all weights together; keeps each weight's best unit anyway."""
    values = []
    costs = []
    least = 0
    for one in units:
        value = one.value.cpu().clone()
        cost = one.cost.cpu()
        # The best unit ranks above all others: every weight keeps one, however low its scores.
        best = int(value.argmax())
        value[best] = torch.inf
        least += int(cost[best])
        values.append(value)
        costs.append(cost)
    kept = _fill(torch.cat(values), torch.cat(costs), max(wanted, least))
    sizes = [len(value) for value in values]
    found = []
    for one, part in zip(units, kept.split(sizes), strict=True):
        found.append(part.to(one.value.device))
    return found


def _fill(value: Tensor, cost: Tensor, wanted: int) -> Tensor:
    """Keeps the best units, at least one, with a total cost nearest to `wanted`; bool [units]."""
    # Stable, so that the first of equal units is kept.
    order = value.argsort(descending=True, stable=True)
    total_cost = cost[order].cumsum(0)
    # The first `count` units cost less than `wanted`; with one more the cost may be nearer to it.
    count = int(torch.searchsorted(total_cost, total_cost.new_tensor(wanted)))
    if count < len(total_cost):
        before = int(total_cost[count - 1]) if count else 0
        after = int(total_cost[count])
        if not count or after - wanted <= wanted - before:
            count += 1
    kept = torch.zeros_like(value, dtype=torch.bool)
    kept[order[:count]] = True
    return kept


def _n_of_m_masks(
    weights: Sequence[Weight], scores: Masks, allowed: Masks, n: int, m: int
) -> Masks:
    """Returns masks with the best `n` of every `m` inputs, or fewer where fewer are allowed."""
    masks: Masks = {}
    for w in weights:
        may = allowed[w.name]
        masks[w.name] = n_of_m(scores[w.name].masked_fill(~may, -torch.inf), w, n, m) & may
    return masks


def _allowed(weight: Weight, within: Mapping[str, Tensor] | None) -> Tensor:
    """Returns the entries that may be kept: those of an earlier mask, or all."""
    if within is not None and weight.name in within:
        return within[weight.name]
    return torch.ones(weight.value.shape, dtype=torch.bool, device=weight.value.device)


def _check_scores(weight: Weight, scores: Tensor) -> Tensor:
    """Returns the scores on the weight's device.

    Raises:
        ModelError: if a score is NaN.
    """
    if scores.isnan().any():
        raise ModelError(
            f"'{weight.name}' has scores that are NaN",
            place="scores",
            cure="use a model that trained well",
        )
    return scores.detach().to(weight.value.device)


@torch.no_grad()
def apply_masks_(weights: Iterable[Weight], masks: Mapping[str, Tensor]) -> None:
    """Zeroes the entries of `weights` that their masks do not keep."""
    for weight in weights:
        weight.value.masked_fill_(~masks[weight.name], 0)


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Returns the share of entries that are kept.

    >>> density_of({"w": torch.tensor([True, False])})
    0.5
    """
    kept = entries = 0
    for mask in masks.values():
        kept += int(mask.sum())
        entries += mask.numel()
    return kept / max(1, entries)


def masks_of(model: nn.Module, names: Iterable[str]) -> Masks:
    """Returns masks of the entries that the named sparse parameters keep.

    These are the entries that are not 0. A quantized weight may keep entries that were rounded to
    0; the layer marks them, and they count as kept.
    """
    return kept_entries(model, names)
