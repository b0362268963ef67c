"""Describes a network of torch.nn layers as JSON, so that a saved file needs no user code.

The network must be a single layer, or an `nn.Sequential` of layers and further sequences. Other
containers have their own forward, which JSON cannot describe.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.core import limits
from fedpress.errors import ModelError, first_line

NAME = "torch-layers"
"""Name that saved files give to the architecture of such a network."""
_NAMES = """
Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding
EmbeddingBag BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d
GroupNorm LayerNorm RMSNorm LocalResponseNorm MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d
AvgPool3d LPPool1d LPPool2d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU
CELU GELU SiLU Mish GLU Sigmoid LogSigmoid Tanh Softplus Softsign Softmin Softmax Softmax2d
LogSoftmax Softshrink Hardshrink Tanhshrink Hardtanh Hardsigmoid Hardswish Threshold Dropout
Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Identity Flatten Unflatten
Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle
Fold Unfold ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d
ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d RNN LSTM GRU
"""
LAYERS = frozenset(_NAMES.split())
"""Names of the classes of torch.nn that a file may name."""
# Arguments of recurrent layers: torch takes them as *args, so the signature does not name them.
RECURRENT = (
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
)
# Arguments of torch's layers that a file may not set: a network is built in float32 on the CPU.
DEVICE_ARGUMENTS = ("device", "dtype")
# Attributes in which torch keeps the hooks of a module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def build(layers: dict[str, dict[str, JsonValue]]) -> nn.Module:
    """Builds the network that `layers` describes.

    Args:
        layers: name of each module -> its class and arguments, such as `{"layer": "Linear",
            "in_features": 4, "out_features": 2}`. The name "" is the network itself. A sequence
            must come before its layers.

    Raises:
        ModelError: if the network itself is missing, if a layer is neither a `Sequential` nor in
            `LAYERS`, if it is not inside a `Sequential`, if its arguments do not fit, or if a limit
            of `fedpress.core.limits` is exceeded.

    >>> linear = {"layer": "Linear", "in_features": 4, "out_features": 2}
    >>> build({"": {"layer": "Sequential"}, "0": linear})
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    if not isinstance(layers, dict) or "" not in layers:
        raise ModelError(
            f"got {str(layers)[:60]!r}, expected a table of layers by name, with the name ''",
            place="layers",
        )
    root = _layer("", layers[""])
    for name, about in layers.items():
        if not name:
            continue
        # torch visits nested modules recursively: too deep a nesting would crash the process.
        limits.check("depth", name.count(".") + 1, f"layers['{name[:40]}']")
        parent_name, _, last = name.rpartition(".")
        try:
            parent = root.get_submodule(parent_name)
        except AttributeError:
            parent = None
        if not isinstance(parent, nn.Sequential):
            raise ModelError(
                f"'{name}' is not inside a Sequential",
                place="layers",
                cure="list the Sequential that contains it first",
            )
        parent.add_module(last, _layer(name, about))
    return root


def _layer(name: str, about: dict[str, JsonValue]) -> nn.Module:
    place = f"layers['{name}']"
    if not isinstance(about, dict):
        raise ModelError(
            f"got {str(about)[:60]!r}, expected a table with the key 'layer'", place=place
        )
    arguments = {key: _tuples(value) for key, value in about.items() if key != "layer"}
    kind = about.get("layer")
    if kind == "Sequential" and not arguments:
        return nn.Sequential()
    if kind not in LAYERS:
        raise ModelError(
            f"{str(kind)[:60]!r} is no layer of torch.nn that a file may name",
            place=place,
            cure="write a function that builds this network, and give module:function",
        )
    for key in arguments:
        if key in DEVICE_ARGUMENTS:
            raise ModelError(
                f"'{key}' may not be set by a file",
                place=place,
                cure="a network is built in float32 on the CPU",
            )
    # torch's time to build a recurrent layer grows with the square of num_layers.
    num_layers = arguments.get("num_layers")
    if isinstance(num_layers, int):
        limits.check("recurrent", num_layers, f"{place}.num_layers")
    try:
        layer = getattr(nn, str(kind))(**arguments)
    except limits.AboveLimit:
        raise
    # torch raises errors of many types for wrong arguments.
    except Exception as error:
        raise ModelError(
            f"{kind} cannot be built ({first_line(error)[:120]})",
            place=place,
            cure=f"give arguments that torch.nn.{kind} takes",
        ) from error
    assert isinstance(layer, nn.Module)
    return layer


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def describe(model: nn.Module) -> dict[str, JsonValue] | None:
    """Returns the arguments with which `build` makes this network; None if `build` cannot make it.

    To be sure, a second network is built from these arguments. Both must have the same `repr`,
    which shows class and arguments of each layer, and the same names, dtypes and shapes of tensors.
    """
    layers: dict[str, JsonValue] = {}
    # If one layer is used twice, `build` would make two independent layers of it.
    modules = list(model.named_modules(remove_duplicate=False))
    if len({id(module) for _, module in modules}) != len(modules):
        return None
    parameters = list(model.named_parameters(remove_duplicate=False))
    if len({id(value) for _, value in parameters}) != len(parameters):
        return None
    for name, module in modules:
        about = _described(module)
        if about is None:
            return None
        layers[name] = about
    try:
        rebuilt = build(layers)  # type: ignore[arg-type]
    except ModelError:
        return None
    same = repr(rebuilt) == repr(model) and _tensors(rebuilt) == _tensors(model)
    return {"layers": layers} if same else None


def _tensors(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}


def _described(module: nn.Module) -> dict[str, JsonValue] | None:
    """Returns class and arguments of one module; None if they do not determine its outputs."""
    kind = type(module)
    # Hooks change what a layer computes, and so does a `forward` that was set on the object.
    if any(getattr(module, hooks, None) for hooks in HOOKS) or "forward" in vars(module):
        return None
    if kind is nn.Sequential:
        return {"layer": "Sequential"}
    if kind.__name__ not in LAYERS or list(module.children()):
        return None
    # A user's class may have the same name as a class of torch.
    if getattr(nn, kind.__name__) is not kind:
        return None
    about: dict[str, JsonValue] = {"layer": kind.__name__}
    for name, default in _parameters(module):
        value = as_json(_argument_of(module, name, default))
        if value is NotImplemented:
            return None
        about[name] = value
    return about


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    """Returns name and default of each argument of a layer."""
    if isinstance(module, nn.RNNBase):
        names = [name for name in RECURRENT if name != "proj_size" or isinstance(module, nn.LSTM)]
        if isinstance(module, nn.RNN):
            names.append("nonlinearity")
        return [(name, None) for name in names]
    found = []
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name in ("self", *DEVICE_ARGUMENTS) or parameter.kind == parameter.VAR_POSITIONAL:
            continue
        found.append((name, parameter.default))
    return found


def _argument_of(module: nn.Module, name: str, default: Any) -> Any:
    """Returns an argument's value, taken from the attribute with the same name.

    Returns NotImplemented if the value is unknown.
    """
    value = getattr(module, name, NotImplemented)
    # The argument `bias` is a flag, and the attribute is the parameter or None.
    if name == "bias" and not isinstance(value, bool):
        return isinstance(value, Tensor)
    if isinstance(value, Tensor):
        return NotImplemented
    if value is NotImplemented:
        # Arguments such as `_weight` only set initial values; there is no attribute with this name.
        return default if default is not inspect.Parameter.empty else NotImplemented
    return value


def as_json(value: Any) -> Any:
    """Returns an argument's value in JSON types; NotImplemented if that is not possible."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else NotImplemented
    if isinstance(value, tuple | list):
        parts = [as_json(part) for part in value]
        return NotImplemented if NotImplemented in parts else parts
    return NotImplemented
