"""Which layers can be quantized, subclasses of a user among them, and the class that each becomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpress.nn.forward_probe import base_layer, why_not_plain
from fedpress.nn.quantized.layer import QuantLayer
from fedpress.nn.quantized.layers import QUANTIZED_CLASSES
from fedpress.nn.quantized.names import weight_keys


class _QuantSubclass(QuantLayer):
    """A layer of a subclass whose forward is the plain one behind what it does to its input (see `forward_probe`)."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps what the plain layer maps."""
        twin = self.plain_twin(weight=self.quantized_weight())
        return twin.forward(self.quantized_input(input), *args, **kwargs)


def quantized_class(kind: type[nn.Module]) -> type[QuantLayer]:
    """Returns the quantized form of a kind of layer; that of a subclass is made here.

    Raises:
        KeyError: if there is none.
    """
    found = QUANTIZED_CLASSES.get(kind) or _SUBCLASSES.get(kind)
    if found is not None:
        return found
    same = _same_as(kind)
    base = same or base_layer(kind)
    if base is None:
        raise KeyError(kind)
    parts = {
        "plain": kind,
        "channel_axis": QUANTIZED_CLASSES[base].channel_axis,
        "__doc__": f"{kind.__name__}, quantized.",
    }
    own = QUANTIZED_CLASSES[base] if same else _QuantSubclass
    made = _SUBCLASSES[kind] = type(f"Quant{kind.__name__}", (own, kind), parts)
    return made


def _same_as(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the layer that a subclass computes like, since it changes nothing but how it is made.

    Only what the layer itself does not have may be added: a function of the layer that is replaced may be a part of its
    forward.
    """
    base = next((k for k in QUANTIZED_CLASSES if issubclass(kind, k)), None)
    if base is None:
        return None
    own = {name for k in kind.__mro__[: kind.__mro__.index(base)] for name in vars(k)}
    return base if own.isdisjoint({*dir(base)} - MADE_BY) else None


MADE_BY = {
    *("__init__", "__doc__", "__module__", "__annotations__", "__constants__"),
    *("reset_parameters", "_reset_parameters", "extra_repr"),
}
"""What a subclass may replace and still compute the same."""

_SUBCLASSES: dict[type[nn.Module], type[QuantLayer]] = {}
"""What `quantized_class` has made: two layers of one class stay of one class."""


def why_not_quantizable(module: nn.Module) -> str | None:
    """Says why `module`, which has weights, cannot be quantized; None if it can.

    A subclass of a convolution or linear layer is run once on made-up inputs to see what it does with its weight.
    """
    if isinstance(module, QuantLayer):
        return None
    return (
        _why_weight_is_computed(module)
        or _why_forward_is_unknown(module)
        or _why_weight_does_not_fit(module)
        or _why_subclass_differs(module)
    )


def _same_forward(kind: type[nn.Module]) -> bool:
    return kind in QUANTIZED_CLASSES or _same_as(kind) is not None


def _known(kind: type[nn.Module]) -> bool:
    return _same_forward(kind) or base_layer(kind) is not None


def _why_weight_is_computed(module: nn.Module) -> str | None:
    if all(key in module._parameters for key in weight_keys(module)):
        return None
    if not hasattr(module, "parametrizations") and not _known(type(module)):
        return None
    cure = "make it plain first (remove_parametrizations, prune.remove)"
    return f"its weight is computed from other parameters; {cure}"


def _why_forward_is_unknown(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced by another function; quantize it before that"
    if _known(type(module)):
        return None
    base = next((kind.__name__ for kind in QUANTIZED_CLASSES if isinstance(module, kind)), None)
    unlike = f", unlike {base}" if base else ""
    return f"{type(module).__name__} computes in its own way{unlike}"


def _why_weight_does_not_fit(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return (
            "it changes its rows itself (max_norm) or has sparse gradients, "
            "which quantized weights do not take"
        )
    for key in weight_keys(module):
        dtype = getattr(module._parameters[key], "dtype", torch.float32)
        if dtype != torch.float32:
            return (
                f"its weights are {dtype}, but only float32 is quantized; call model.float() first"
            )
    return None


def _why_subclass_differs(module: nn.Module) -> str | None:
    if _same_forward(type(module)):
        return None
    difference = why_not_plain(module)
    return difference and f"{type(module).__name__} computes in its own way: {difference}"
