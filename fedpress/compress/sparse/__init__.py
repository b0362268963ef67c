"""Makes weights sparse: masks say which entries stay, schedules say how many stay at each step."""

from fedpress.compress.sparse.masks import (
    Masks,
    apply_masks_,
    density_of,
    masks_from_scores,
    masks_of,
)
from fedpress.compress.sparse.patterns import Pattern
from fedpress.compress.sparse.schedules import (
    cubic_density,
    drop_share,
    geometric_density,
    iterative_density,
    regrow,
)
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
    "apply_masks_",
    "cubic_density",
    "density_of",
    "drop_share",
    "find_weights",
    "geometric_density",
    "iterative_density",
    "masks_from_scores",
    "masks_of",
    "regrow",
    "score_weights",
]
