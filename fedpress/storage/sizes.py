"""Sizes of a model: bytes of its saved file, bytes of its packed file, and nonzero parameters."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from fedpress.compress import cost
from fedpress.errors import ModelError
from fedpress.models import ModelSpec
from fedpress.nn.quantized import quantized_layers
from fedpress.storage.packed import to_bytes


def file_bytes(spec: ModelSpec | None, model: nn.Module) -> int:
    """Returns the size of a saved model in bytes, as commands and reports show it.

    For a float model this is the size of all tensors. For a quantized model it is the size of the
    packed file, because a file of float32 tensors would be as large as without quantization. If
    `spec` is None or the model cannot be packed, it is the size of all tensors.
    """
    schemes = {name: layer.scheme for name, layer in quantized_layers(model)}
    if spec is None or not schemes:
        return cost.state_bytes(model)
    # The spec of a user's module may lack the quantization schemes, which the file contains.
    complete = spec.model_copy(update={"quantized": spec.quantized or schemes})
    packed = packed_file_bytes(complete, model)
    return cost.state_bytes(model) if packed is None else packed


def packed_file_bytes(spec: ModelSpec | None, model: nn.Module) -> int | None:
    """Returns the size of the file that `pack` would write; None if the model cannot be packed."""
    if spec is None:
        return None
    with suppress(ModelError):
        return len(to_bytes(spec, model)[0])
    return None


def nonzero_parameters(model: nn.Module) -> int:
    """Counts the nonzero values of all parameters.

    >>> from torch import nn
    >>> layer = nn.Linear(3, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight[0])
    >>> nonzero_parameters(layer)
    3
    """
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())
