"""Zeros in the weights: which may have them, what goes together, what matters least, and when."""

from fedpress.compress.sparse.masks import Masks, apply_, choose, density_of, masks_of
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.schedules import cubic, drop_share, geometric, regrow, steps_down
from fedpress.compress.sparse.scores import WEIGHT_SCORES, Movement, WeightEvidence, score_weights
from fedpress.compress.sparse.weights import Weight, Weights, find_weights

__all__ = [
    "WEIGHT_SCORES",
    "Masks",
    "Movement",
    "Pattern",
    "Weight",
    "WeightEvidence",
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
