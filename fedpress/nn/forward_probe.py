"""Trial runs of user-defined subclasses of `nn.Linear` and of convolutions.

A subclass can be quantized like its base layer if it only prepares the input, for instance by
padding, and then applies the weight as the base layer does. A trial run on random inputs checks
this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

OPERATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
"""The operation by which each kind of layer applies its weight."""

PROPERTIES = (
    "shape",
    "dtype",
    "device",
    "ndim",
    "requires_grad",
    "is_cuda",
    "layout",
    "grad",
    "names",
)
"""Attributes of a weight that forward may read, because they do not depend on its values."""

SIZES = ("size", "dim", "numel", "stride", "is_floating_point", "__len__", "is_contiguous")
"""Methods of a weight that forward may call, because they do not depend on its values."""


def base_layer(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the torch class, such as `nn.Conv2d`, that `kind` is a subclass of, or None."""
    return next((base for base in OPERATIONS if issubclass(kind, base)), None)


class WeightReads(TorchFunctionMode):
    """Records how a layer's weight is used while its forward runs.

    Attributes:
        layer: the layer that has the weight.
        operation: the operation of its base layer, such as `F.conv2d`.
        calls: for each call of `operation` with the weight: name -> argument.
        others: names of all other functions that used the weight's values.
    """

    def __init__(self, layer: nn.Module, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.operation = operation
        self.calls: list[dict[str, Any]] = []
        self.others: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs `func`, and records it if it reads the weight."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        weight = self.layer.weight
        if not any(leaf is weight for leaf in tree_leaves((args, kwargs))):
            return result
        name = str(getattr(func, "__name__", func))
        named = _arguments(args, kwargs)
        asks_property = (
            name == "__get__"
            and getattr(getattr(func, "__self__", None), "__name__", "") in PROPERTIES
        )
        if func is self.operation and named.get("weight") is weight:
            self.calls.append(named)
        elif not asks_property and name not in SIZES and result is not weight:
            # `weight.to(x.dtype)` may return the weight itself, and has then not used its values.
            self.others.append(name)
        return result


def _arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a convolution or linear operation by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@torch.no_grad()
def _probe(layer: nn.Module, x: Tensor) -> WeightReads:
    """Runs a copy of `layer` in evaluation mode on `x`; returns the recorded uses of its weight."""
    base = base_layer(type(layer))
    assert base is not None
    # A copy, because a user's forward may change the layer.
    own = copy.deepcopy(layer).eval()
    reads = WeightReads(own, OPERATIONS[base])
    with torch.random.fork_rng(devices=[]), reads:
        # `forward` and not a call of the layer: its hooks must not run for this trial.
        own.forward(x)
    return reads


def why_not_plain(layer: nn.Module) -> str | None:
    """Returns why a subclass cannot be quantized like its base layer; None if it can be.

    The weight must be used exactly once, by the operation of the base layer, with the layer's bias
    unchanged. The input of this operation must consist of entries of the layer's input and zeros,
    as after padding. Then rounding the layer's input is the same as rounding the input of the
    operation. What forward does with the output of the operation is free.
    """
    base = base_layer(type(layer))
    assert base is not None
    for name, parameter in layer.named_parameters():
        # Vectors, such as the scales of a norm, are allowed.
        if name not in ("weight", "bias") and parameter.dim() > 1:
            return f"it has weights beside its own ('{name}')"

    # A second run on rounded inputs shows whether the preparation only copies values.
    x = _random_input(layer)
    try:
        reads = _probe(layer, x)
        rounded_reads = _probe(layer, _rounded(x))
    except Exception as problem:  # the user's forward may need anything
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return f"it does not run on an ordinary input ({first[:120]})"

    # Forward may depend on the values of its input, so both runs are checked.
    for run in (reads, rounded_reads):
        if run.others:
            return f"it reads its weight by '{run.others[0]}'"
        if len(run.calls) != 1:
            return f"it uses its weight {len(run.calls)} times in one forward"
        if run.calls[0].get("bias") is not run.layer._parameters.get("bias"):
            return "it adds its bias in its own way"

    # Only copies and zeros. Functions such as x + 1 and -x pass the test of rounding below.
    given = reads.calls[0]["input"]
    copied = torch.isin(given, x.to(given.dtype)) | (given == 0)
    if not bool(copied.all()):
        return "it changes the values of its input"
    # Rounding after the preparation must equal rounding before it. This finds a choice of entries
    # that depends on their values, for instance by a threshold.
    given_rounded = rounded_reads.calls[0]["input"]
    if given.shape != given_rounded.shape or not torch.equal(_rounded(given), given_rounded):
        return "it changes the values of its input"
    return None


def plain_equivalent(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Returns a base layer with the sizes of a subclass, and the input of its operation for `x`.

    Example: for a subclass that pads its input, a `Conv2d` and the padded input. The base layer is
    on the meta device: its weight has a shape but no values. It only says how the weight meets the
    input, for instance which patches of an image a convolution reads.
    """
    call = _probe(layer, x).calls[0]
    given = call["input"]
    base = base_layer(type(layer))
    assert base is not None
    weight = layer.weight
    assert isinstance(weight, Tensor)

    out, inputs_of_group, *kernel = weight.shape
    if base is nn.Linear:
        return nn.Linear(inputs_of_group, out, device="meta"), given
    groups = call.get("groups", 1)
    plain = base(
        inputs_of_group * groups,
        out,
        tuple(kernel),
        stride=call.get("stride", 1),
        padding=call.get("padding", 0),
        dilation=call.get("dilation", 1),
        groups=groups,
        device="meta",
    )
    return plain, given


def _random_input(layer: nn.Module) -> Tensor:
    """Returns two random examples; images are slightly larger than the kernel."""
    generator = torch.Generator().manual_seed(0)
    assert isinstance(layer.weight, Tensor)
    device = layer.weight.device
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, generator=generator).to(device)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    # Larger than the dilated kernel, so that the output has several positions in every direction.
    sides = []
    for k, d in zip(layer.kernel_size, layer.dilation, strict=True):
        sides.append((k - 1) * d + 4 + k)
    return torch.randn(2, layer.in_channels, *sides, generator=generator).to(device)


def _rounded(x: Tensor) -> Tensor:
    """Rounds to multiples of 1/4.

    0 is a multiple of 1/4. Quantization grids of inputs with more than one bit contain 0 too.
    """
    return (x * 4).round() / 4
