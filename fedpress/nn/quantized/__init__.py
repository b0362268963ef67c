"""Torch layers with weights, and optionally inputs, quantized to a few bits.

A `QuantizationScheme` says how values are rounded; the scales are tensors of the layer. A grid
point is a value that can be represented, such as 3 * scale. `weight` stays a float tensor. In
training it is the latent weight: the layer computes with the grid point nearest to each entry, and
the gradient passes unchanged through the rounding (straight-through estimator). `materialize_`
writes the grid points into `weight`. Then every entry of a weight of kind "int" is exactly an
integer times its scale.
"""

# Other folders import these names from here and not from the files.
from fedpress.nn.quantized.classes import quantized_class, why_not_quantizable
from fedpress.nn.quantized.convert import materialize_, quantize_layers_, remove_quantization_
from fedpress.nn.quantized.kept_zeros import kept_entries, note_kept_zeros_, register_kept_zeros_
from fedpress.nn.quantized.layer import QuantLayer, qparam_ids, quantized_layers, quantized_weights
from fedpress.nn.quantized.layers import INPUT_QUANTIZED, QUANTIZED_CLASSES
from fedpress.nn.quantized.names import (
    codebook_name,
    is_qparam,
    scale_name,
    weight_keys,
    weight_name,
)

__all__ = [
    "INPUT_QUANTIZED",
    "QUANTIZED_CLASSES",
    "QuantLayer",
    "codebook_name",
    "is_qparam",
    "kept_entries",
    "materialize_",
    "note_kept_zeros_",
    "qparam_ids",
    "quantize_layers_",
    "quantized_class",
    "quantized_layers",
    "quantized_weights",
    "register_kept_zeros_",
    "remove_quantization_",
    "scale_name",
    "weight_keys",
    "weight_name",
    "why_not_quantizable",
]
