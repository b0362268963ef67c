"""When zeros come, and when they move: densities over the course of a training, and RigL's drop and growth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpress.compress.sparse.masks import Masks, choose
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.weights import Weight


def cubic(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1) on the way from `start` to `end`: fast first, then ever slower.

    Zhu & Gupta 2017, arXiv:1710.01878, eq. 1.

    >>> [round(cubic(p, start=1.0, end=0.1), 4) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def steps_down(round: int, rounds: int, *, start: float, end: float) -> float:
    """Returns the density after `round` of `rounds` cuts that each keep the same share of what is left.

    Frankle & Carbin 2019, arXiv:1803.03635, section 2.

    >>> steps_down(1, 2, start=1.0, end=0.25)
    0.5
    """
    return end if round >= rounds else geometric(round / rounds, start=start, end=end)


def geometric(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1) on the way from `start` to `end`, by the same factor in the same time.

    >>> geometric(0.5, start=1.0, end=0.25)
    0.5
    """
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))


def drop_share(progress: float, first: float) -> float:
    """Returns the share of each layer's weights that RigL moves at `progress` (0..1): a cosine from `first` to 0.

    Evci et al. 2020, arXiv:1911.11134, section 3.3.

    >>> [round(drop_share(p, 0.3), 3) for p in (0.0, 0.5, 1.0)]
    [0.3, 0.15, 0.0]
    """
    return first / 2 * (1 + math.cos(math.pi * min(progress, 1.0)))


def regrow(
    weights: Sequence[Weight],
    masks: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    pattern: Pattern,
    *,
    share: float,
    within: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Moves `share` of each layer's weights to where the loss is steepest; the count in each layer stays.

    The smallest weights are dropped, and as many grow at the largest |gradient| among all that do not stay, also those
    just dropped (Evci et al. 2020, arXiv:1911.11134, algorithm 1: i not in theta less I_active). One that is dropped
    and grows at once never was away, and keeps its value, as in the authors' code. Set the new ones to 0.

    Args:
        weights: with masks.
        masks: what is kept now.
        gradients: of the loss by each weight, dense.
        pattern: "unstructured" or another with units: whole blocks, filters or channels move.
        share: of the kept entries.
        within: where weights may grow, by name; anywhere without.

    Returns:
        The new masks.
    """
    moved: Masks = {}
    for w in weights:
        mask = masks[w.name]
        may = torch.ones_like(mask) if within is None else within[w.name]
        kept = int(mask.sum())
        stay = kept - int(share * kept)
        moved[w.name] = mask
        if stay == kept or stay < 1:
            continue
        one = {w.name: w.value.detach().abs()}
        left = choose([w], one, pattern, density=stay / w.size, within={w.name: mask})[w.name]
        free = may & ~left
        count = min(kept - int(left.sum()), int(free.sum()))
        if count:
            steep = {w.name: gradients[w.name].abs()}
            moved[w.name] = (
                left
                | choose([w], steep, pattern, density=count / w.size, within={w.name: free})[w.name]
            )
    return moved
