"""Sparsity: zeros in single weights, blocks or filters, chosen by scores, and their schedules."""

from fedpress.compress.sparse.masks import Masks, apply_, choose, density_of, masks_of
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.schedules import cubic, drop_share, geometric, regrow, steps_down
from fedpress.compress.sparse.scores import (
    WEIGHT_SCORES,
    Movement,
    WeightScoreInputs,
    score_weights,
)
from fedpress.compress.sparse.weights import Weight, Weights, find_weights

__all__ = [
    "WEIGHT_SCORES",
    "Masks",
    "Movement",
    "Pattern",
    "Weight",
    "WeightScoreInputs",
    "Weights",
    "apply_",
    "choose",
    "cubic",
    "density_of",
    "drop_share",
    "find_weights",
    "geometric",
    "masks_of",
    "regrow",
    "score_weights",
    "steps_down",
]
