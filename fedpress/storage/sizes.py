"""One meaning for each size of a model: `file_bytes` is its saved file, `packed_file_bytes` its packed one."""

from __future__ import annotations

from contextlib import suppress

from torch import nn

from fedpress.compress import cost
from fedpress.errors import ModelError
from fedpress.models import ModelSpec
from fedpress.nn.quantized import quantized_layers
from fedpress.storage.packed import to_bytes


def file_bytes(spec: ModelSpec | None, model: nn.Module) -> int:
    """Returns the bytes of the numbers as a model is kept: float32, or packed where weights are quantized.

    Commands, reports and measurements all say this one; an exported file has the size of that file.
    """
    schemes = {name: layer.scheme for name, layer in quantized_layers(model)}
    if spec is None or not schemes:
        return cost.state_bytes(model)
    # The spec of a module in memory may not know its schemes; they are a part of the file.
    complete = spec.model_copy(update={"quantized": spec.quantized or schemes})
    packed = packed_file_bytes(complete, model)
    return cost.state_bytes(model) if packed is None else packed


def packed_file_bytes(spec: ModelSpec | None, model: nn.Module) -> int | None:
    """Returns the bytes of the file that the pack stage would write, or None where it would say that it cannot."""
    if spec is None:
        return None
    with suppress(ModelError):
        return len(to_bytes(spec, model)[0])
    return None


def nonzero_parameters(model: nn.Module) -> int:
    """Counts the parameters that are not 0.

    >>> from torch import nn
    >>> layer = nn.Linear(3, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight[0])
    >>> nonzero_parameters(layer)
    3
    """
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())
