"""Sparsity schedules: the density over a training, and RigL's dropping and growing of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpress.compress.sparse.masks import Masks, choose
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.weights import Weight


def cubic(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1) from `start` to `end`: fast first, then slower.

    The cubic schedule of Zhu & Gupta 2017, arXiv:1710.01878, eq. 1.

    >>> [round(cubic(p, start=1.0, end=0.1), 4) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def steps_down(round: int, rounds: int, *, start: float, end: float) -> float:
    """Returns the density after `round` of `rounds` prunings that each keep the same share.

    Frankle & Carbin 2019, arXiv:1803.03635, section 2.

    >>> steps_down(1, 2, start=1.0, end=0.25)
    0.5
    """
    if round >= rounds:
        return end  # exactly, without rounding errors
    return geometric(round / rounds, start=start, end=end)


def geometric(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1) from `start` to `end`, at a constant rate of decay.

    >>> geometric(0.5, start=1.0, end=0.25)
    0.5
    """
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))


def drop_share(progress: float, first: float) -> float:
    """Returns the share of weights that RigL moves at `progress` (0..1): from `first` to 0.

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
    """Drops the smallest weights of each layer and grows as many where the gradient is largest.

    All entries that are not kept may grow, including those just dropped (Evci et al. 2020,
    arXiv:1911.11134, algorithm 1: i not in theta less I_active). A weight that is dropped and grown
    at once keeps its value, as in the authors' code. The caller sets the other new weights to 0.

    Args:
        weights: with masks.
        masks: the entries that are kept now.
        gradients: of the loss with respect to each weight, zeros included.
        pattern: "unstructured", or another with units: whole blocks, filters or channels move.
        share: of the kept entries to drop.
        within: where weights may grow, by name; None for anywhere.

    Returns:
        The new masks, with as many entries in each layer.
    """
    new_masks: Masks = {}
    for w in weights:
        mask = masks[w.name]
        new_masks[w.name] = mask
        kept = int(mask.sum())
        remaining = kept - int(share * kept)
        if remaining == kept or remaining < 1:
            continue
        # Only kept entries compete: zeros have no size.
        sizes = {w.name: w.value.detach().abs()}
        kept_density = remaining / w.size
        largest = choose([w], sizes, pattern, density=kept_density, within={w.name: mask})[w.name]

        may_grow = torch.ones_like(mask) if within is None else within[w.name]
        free = may_grow & ~largest
        # Whole units may drop more or fewer entries than asked for.
        count = min(kept - int(largest.sum()), int(free.sum()))
        if count:
            slopes = {w.name: gradients[w.name].abs()}
            grown = choose([w], slopes, pattern, density=count / w.size, within={w.name: free})
            new_masks[w.name] = largest | grown[w.name]
    return new_masks
