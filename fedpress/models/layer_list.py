"""A network of torch's own layers as a list of names and arguments: it opens again without any code of its user.

Only `torch.nn.Sequential` has a forward that is known beforehand, so a network is a layer, or layers in sequences.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from fedpress.core import limits
from fedpress.errors import ModelError

NAME = "torch-layers"
_NAMES = """
Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding EmbeddingBag
BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d GroupNorm LayerNorm RMSNorm
LocalResponseNorm MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d
AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish GLU Sigmoid LogSigmoid Tanh Softplus Softsign Softmin
Softmax Softmax2d LogSoftmax Softshrink Hardshrink Tanhshrink Hardtanh Hardsigmoid Hardswish Threshold
Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout Identity Flatten Unflatten
Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold
ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d
ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d
RNN LSTM GRU
"""
LAYERS = frozenset(_NAMES.split())
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
PLACES = ("device", "dtype")
"""Arguments of torch's layers that say where and in what type their numbers lie."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def build(layers: dict[str, dict[str, JsonValue]]) -> nn.Module:
    """Builds the network.

    Args:
        layers: by the name that the module has in the network, "" for the network itself, in the order of the
            modules: `{"layer": "Linear", "in_features": 4, "out_features": 2}`.

    Raises:
        ModelError: if a layer is not on the list, or its arguments do not fit.

    >>> build({"": {"layer": "Sequential"}, "0": {"layer": "Linear", "in_features": 4, "out_features": 2}})
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    if not isinstance(layers, dict) or "" not in layers:
        raise ModelError(
            f"got {str(layers)[:60]!r}, expected layers by name, and '' among them",
            place="layers",
        )
    root = _layer("", layers[""])
    for name, about in layers.items():
        if not name:
            continue
        limits.check("depth", name.count(".") + 1, f"layers['{name[:40]}']")
        above, _, last = name.rpartition(".")
        try:
            parent = root.get_submodule(above)
        except AttributeError:
            parent = None
        if not isinstance(parent, nn.Sequential):
            raise ModelError(
                f"'{name}' has no sequence above it",
                place="layers",
                cure="list that before it",
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
    placed = next((key for key in arguments if key in PLACES), None)
    if placed is not None:
        raise ModelError(
            f"'{placed}' is nothing that a file may say",
            place=place,
            cure="a network is built in float32 on the CPU",
        )
    if isinstance(
        inside := arguments.get("num_layers"), int
    ):  # torch takes the square of their number to make them
        limits.check("recurrent", inside, f"{place}.num_layers")
    try:
        layer = getattr(nn, str(kind))(**arguments)
    except limits.AboveLimit:
        raise
    except Exception as error:  # whatever torch says of arguments
        raise ModelError(
            f"{kind} cannot be built ({str(error).splitlines()[0][:120]})",
            place=place,
            cure=f"give what torch.nn.{kind} takes",
        ) from error
    assert isinstance(layer, nn.Module)
    return layer


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def describe(model: nn.Module) -> dict[str, JsonValue] | None:
    """Returns the arguments of `build` that make this network; None if it is not of torch's own layers alone.

    The network is built from them and compared: the same classes, names, and shapes of its tensors, and the same
    `repr`, which names every argument that torch thinks worth telling.
    """
    layers: dict[str, JsonValue] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    if len({id(module) for _, module in modules}) != len(modules):
        return None  # a layer that is used twice would become two
    parameters = list(model.named_parameters(remove_duplicate=False))
    if len({id(value) for _, value in parameters}) != len(parameters):
        return None
    for name, module in modules:
        about = _described(module)
        if about is None:
            return None
        layers[name] = about
    try:
        again = build(layers)  # type: ignore[arg-type]
    except ModelError:
        return None
    same = repr(again) == repr(model) and _tensors(again) == _tensors(model)
    return {"layers": layers} if same else None


def _tensors(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}


def _described(module: nn.Module) -> dict[str, JsonValue] | None:
    kind = type(module)
    if any(getattr(module, hooks, None) for hooks in HOOKS) or "forward" in vars(module):
        return None
    if kind is nn.Sequential:
        return {"layer": "Sequential"}
    if (
        kind.__name__ not in LAYERS
        or getattr(nn, kind.__name__) is not kind
        or list(module.children())
    ):
        return None
    about: dict[str, JsonValue] = {"layer": kind.__name__}
    for name, default in _parameters(module):
        value = _plain(_read(module, name, default))
        if value is NotImplemented:
            return None
        about[name] = value
    return about


def _parameters(module: nn.Module) -> list[tuple[str, Any]]:
    """Returns the names of the arguments of a layer, and their defaults."""
    if isinstance(module, nn.RNNBase):
        names = [name for name in RECURRENT if name != "proj_size" or isinstance(module, nn.LSTM)]
        if isinstance(module, nn.RNN):
            names.append("nonlinearity")
        return [(name, None) for name in names]
    found = inspect.signature(type(module).__init__).parameters
    skipped = ("self", *PLACES)
    return [
        (name, about.default)
        for name, about in found.items()
        if name not in skipped and about.kind != about.VAR_POSITIONAL
    ]


def _read(module: nn.Module, name: str, default: Any) -> Any:
    """Reads an argument back from the attribute of its name."""
    value = getattr(module, name, NotImplemented)
    if name == "bias" and not isinstance(
        value, bool
    ):  # the parameter stands in the place of the flag
        return isinstance(value, Tensor)
    if isinstance(value, Tensor):
        return NotImplemented
    if value is NotImplemented:
        # Arguments that only matter while a layer is made (`_weight`, `init`) leave nothing behind.
        return default if default is not inspect.Parameter.empty else NotImplemented
    return value


def _plain(value: Any) -> Any:
    """Returns the value as JSON knows it, NotImplemented if it does not."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else NotImplemented
    if isinstance(value, tuple | list):
        parts = [_plain(part) for part in value]
        return NotImplemented if NotImplemented in parts else parts
    return NotImplemented
