"""Decides which layers can be quantized, and creates quantized classes of user-defined layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedpress.nn.forward_probe import base_layer, why_not_plain
from fedpress.nn.quantized.layer import QuantLayer
from fedpress.nn.quantized.layers import QUANTIZED_CLASSES
from fedpress.nn.quantized.names import weight_keys


class _QuantSubclass(QuantLayer):
    """Base of quantized user-defined layers that prepare their input, for instance by padding.

    `fedpress.nn.forward_probe` checks that the user's layers do nothing else.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the forward of the subclass with quantized input and weight."""
        twin = self.plain_twin(weight=self.quantized_weight())
        return twin.forward(self.quantized_input(input), *args, **kwargs)


def quantized_class(kind: type[nn.Module]) -> type[QuantLayer]:
    """Returns the quantized class for a class of layers, such as `QuantLinear` for `nn.Linear`.

    For a user-defined class, a quantized class is created.

    Raises:
        KeyError: if layers of this class cannot be quantized.
    """
    # Looked up by the exact class: a subclass may compute something else.
    found = QUANTIZED_CLASSES.get(kind) or _SUBCLASSES.get(kind)
    if found is not None:
        return found
    equivalent = _equivalent_layer(kind)
    base = equivalent or base_layer(kind)
    if base is None:
        raise KeyError(kind)
    attributes = {
        "plain": kind,
        "channel_axis": QUANTIZED_CLASSES[base].channel_axis,
        "__doc__": f"{kind.__name__}, quantized.",
    }
    # `_QuantSubclass` calls the forward of the user's class; an equivalent class has torch's own.
    parent = QUANTIZED_CLASSES[base] if equivalent else _QuantSubclass
    _SUBCLASSES[kind] = type(f"Quant{kind.__name__}", (parent, kind), attributes)
    return _SUBCLASSES[kind]


def _equivalent_layer(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the torch layer that `kind` is a subclass of, if both compute the same; else None.

    The subclass may add methods, but must not override methods that forward could call.
    """
    base = next((k for k in QUANTIZED_CLASSES if issubclass(kind, k)), None)
    if base is None:
        return None
    replaced: set[str] = set()
    for subclass in kind.__mro__[: kind.__mro__.index(base)]:
        replaced.update(vars(subclass))
    replaced &= set(dir(base))
    return base if replaced <= CONSTRUCTION else None


CONSTRUCTION = {
    *("__init__", "__doc__", "__module__", "__annotations__", "__constants__"),
    *("reset_parameters", "_reset_parameters", "extra_repr"),
}
"""Names that a subclass may override without changing what it computes."""

_SUBCLASSES: dict[type[nn.Module], type[QuantLayer]] = {}
"""Cache of the classes that `quantized_class` has created: one for each user-defined class."""


def why_not_quantizable(module: nn.Module) -> str | None:
    """Returns why a module with weights cannot be quantized; None if it can be quantized.

    A subclass of a convolution or linear layer is run on random inputs to observe how it uses its
    weight.
    """
    if isinstance(module, QuantLayer):
        return None
    # The trial run comes last: the other checks are cheap, and their reasons are more precise.
    checks = (
        _why_weight_is_computed,
        _why_forward_is_unknown,
        _why_weight_does_not_fit,
        _why_subclass_differs,
    )
    for check in checks:
        reason = check(module)
        if reason is not None:
            return reason
    return None


def _same_forward(kind: type[nn.Module]) -> bool:
    return kind in QUANTIZED_CLASSES or _equivalent_layer(kind) is not None


def _can_be_known(kind: type[nn.Module]) -> bool:
    return _same_forward(kind) or base_layer(kind) is not None


def _why_weight_is_computed(module: nn.Module) -> str | None:
    """Returns a reason if a weight is computed, for instance by a parametrization."""
    # A computed weight is an attribute or a property, not one of the module's parameters.
    if all(key in module._parameters for key in weight_keys(module)):
        return None
    if not hasattr(module, "parametrizations") and not _can_be_known(type(module)):
        return None
    cure = "make it plain first (remove_parametrizations, prune.remove)"
    return f"its weight is computed from other parameters; {cure}"


def _why_forward_is_unknown(module: nn.Module) -> str | None:
    """Returns a reason if the module's class does not tell what its forward computes."""
    # A function assigned to `module.forward` hides the forward of the class.
    if "forward" in module.__dict__:
        return "its forward was replaced by another function; quantize the layer before that"
    if _can_be_known(type(module)):
        return None
    for kind in QUANTIZED_CLASSES:
        if isinstance(module, kind):
            own = type(module).__name__
            return f"{own} computes in its own way, unlike {kind.__name__}"
    return f"{type(module).__name__} computes in its own way"


def _why_weight_does_not_fit(module: nn.Module) -> str | None:
    """Returns a reason if forward changes the weight, or the weight is not float32."""
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return (
            "it changes its rows itself (max_norm) or has sparse gradients; "
            "quantized weights support neither"
        )
    # Scales and rounded weights are float32.
    for key in weight_keys(module):
        dtype = getattr(module._parameters[key], "dtype", torch.float32)
        if dtype != torch.float32:
            return (
                f"its weights are {dtype}, but only float32 is quantized; call model.float() first"
            )
    return None


def _why_subclass_differs(module: nn.Module) -> str | None:
    """Returns a reason if a subclass uses its weight differently from its base layer."""
    if _same_forward(type(module)):
        return None
    difference = why_not_plain(module)
    if difference is None:
        return None
    return f"{type(module).__name__} computes in its own way: {difference}"
