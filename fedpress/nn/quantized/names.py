"""Names of a quantized layer's tensors: its weights, and the scale and codebook of each weight."""

from __future__ import annotations

import re

from torch import nn


def weight_keys(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights of a layer that can be quantized, such as ("weight",)."""
    # A recurrent module has two weights for each layer and direction.
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",)


def weight_name(layer: str, key: str) -> str:
    """Returns the name of a weight in the model; `layer` is empty if the model itself is the layer.

    >>> weight_name("head", "weight"), weight_name("", "weight")
    ('head.weight', 'weight')
    """
    return f"{layer}.{key}" if layer else key


def scale_name(key: str) -> str:
    """Returns the name of the scales of a weight: "weight" -> "weight_scale"."""
    return f"{key}_scale"


def codebook_name(key: str) -> str:
    """Returns the name of the codebook of a weight.

    For "weight" this is "codebook", as in files of older versions, where layers had only one
    weight. For "weight_ih_l0" this is "weight_ih_l0_codebook".
    """
    return "codebook" if key == "weight" else f"{key}_codebook"


def kept_zeros_name(key: str) -> str:
    """Returns the name of the buffer that marks the kept zeros of a sparse weight.

    Kept zeros are entries that pruning kept, but that quantization rounded to 0.
    """
    return f"{key}_kept_zeros"


def is_qparam(name: str) -> bool:
    """Returns whether a tensor is a scale, codebook, zero point or middle.

    A middle is the threshold of one-bit inputs, see `fedpress.nn.quant_scheme`.

    >>> is_qparam("gru.weight_hh_l0_scale"), is_qparam("conv.weight")
    (True, False)
    """
    leaf = name.rpartition(".")[2]
    return leaf in INPUT_QPARAMS or bool(WEIGHT_QPARAM.fullmatch(leaf))


INPUT_QPARAMS = ("input_scale", "input_zero_point", "input_middle")
"""Names of the quantization parameters of a layer's inputs."""
WEIGHT_QPARAM = re.compile(r"codebook|\w*weight\w*_(scale|codebook)")
"""Matches the names of scales and codebooks of weights."""
