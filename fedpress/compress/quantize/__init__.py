"""Quantizes trained models: batch-norm folding, calibration, rounding, mixed precision."""

from fedpress.compress.quantize.cluster import shared_values
from fedpress.compress.quantize.fold import find_folds, fold_
from fedpress.compress.quantize.mixed import (
    BitChoice,
    choose_bits,
    layer_bytes,
    measure_choices,
    stored_bytes,
)
from fedpress.compress.quantize.ptq import fit_scales_, quantizable, quantize_
from fedpress.compress.quantize.ranges import calibrate_
from fedpress.nn.observers import OBSERVERS, Observer

__all__ = [
    "OBSERVERS",
    "BitChoice",
    "Observer",
    "calibrate_",
    "choose_bits",
    "find_folds",
    "fit_scales_",
    "fold_",
    "layer_bytes",
    "measure_choices",
    "quantizable",
    "quantize_",
    "shared_values",
    "stored_bytes",
]
