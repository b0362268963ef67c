"""Gives the density of weights at each point of training, and updates masks as RigL does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedpress.compress.sparse.masks import Masks, masks_from_scores
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.weights import Weight


def cubic_density(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1 of the training): falls fast first, then slowly.

    This is the cubic schedule of Zhu & Gupta 2017, arXiv:1710.01878, eq. 1. The density falls from
    `start` to `end`.

    >>> [round(cubic_density(p, start=1.0, end=0.1), 4) for p in (0.0, 0.5, 1.0)]
    [1.0, 0.2125, 0.1]
    """
    return end + (start - end) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def iterative_density(round: int, rounds: int, *, start: float, end: float) -> float:
    """Returns the density after `round` of `rounds` rounds of iterative magnitude pruning.

    Each round keeps the same share of the weights that the previous round kept (Frankle & Carbin
    2019, arXiv:1803.03635, section 2).

    >>> iterative_density(1, 2, start=1.0, end=0.25)
    0.5
    """
    if round >= rounds:
        return end  # a power would have a rounding error here
    return geometric_density(round / rounds, start=start, end=end)


def geometric_density(progress: float, *, start: float, end: float) -> float:
    """Returns the density at `progress` (0..1 of the training): exponential from start to end.

    >>> geometric_density(0.5, start=1.0, end=0.25)
    0.5
    """
    return float(start * (end / start) ** min(max(progress, 0.0), 1.0))


def drop_share(progress: float, first: float) -> float:
    """Returns the share of kept weights that RigL drops at `progress` (0..1 of the training).

    It falls from `first` to 0 by a cosine (Evci et al. 2020, arXiv:1911.11134, section 3.3).

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
    """Updates masks as RigL does: drops the smallest entries, grows as many with large gradients.

    To drop an entry is to remove it from the mask; to grow an entry is to add it. All entries
    outside the mask may grow, including those just dropped (Evci et al. 2020, arXiv:1911.11134,
    algorithm 1). An entry that is dropped and grown in the same update keeps its value, as in the
    authors' code. The caller sets the other grown entries to 0.

    Args:
        weights: the sparse weights.
        masks: present mask of each weight, by name.
        gradients: gradient of the loss with respect to each weight, at zeroed entries too.
        pattern: "unstructured", or a pattern with units: then whole blocks, filters or channels are
            dropped and grown.
        share: share of the kept entries to drop.
        within: masks of the entries that may grow, by name; None for all entries.

    Returns:
        The new masks. Each weight keeps as many entries as before; with whole units, or if too few
        entries may grow, the number can differ.
    """
    new_masks: Masks = {}
    for w in weights:
        mask = masks[w.name]
        new_masks[w.name] = mask
        kept = int(mask.sum())
        remaining = kept - int(share * kept)
        if remaining == kept or remaining < 1:
            continue
        # The entries that remain are the largest of those kept so far.
        sizes = {w.name: w.value.detach().abs()}
        kept_density = remaining / w.size
        remaining_masks = masks_from_scores(
            [w], sizes, pattern, density=kept_density, within={w.name: mask}
        )
        largest = remaining_masks[w.name]

        may_grow = torch.ones_like(mask) if within is None else within[w.name]
        free = may_grow & ~largest
        # With whole units (blocks) more or fewer entries than `share` may have been dropped.
        count = min(kept - int(largest.sum()), int(free.sum()))
        if count:
            slopes = {w.name: gradients[w.name].abs()}
            grown = masks_from_scores(
                [w], slopes, pattern, density=count / w.size, within={w.name: free}
            )
            new_masks[w.name] = largest | grown[w.name]
    return new_masks
