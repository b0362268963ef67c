"""Whether a subclass of a layer computes what the layer does: found by running it once on made-up inputs."""

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
"""The operation by which each kind of layer reads its weight."""

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
"""What may be asked about a weight without reading its values."""

SIZES = ("size", "dim", "numel", "stride", "is_floating_point", "__len__", "is_contiguous")


def base_layer(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the layer that `kind` is a subclass of, if a subclass of it may be looked into."""
    return next((base for base in OPERATIONS if issubclass(kind, base)), None)


class WeightReads(TorchFunctionMode):
    """Notes how a layer's weight is read while its forward runs."""

    def __init__(self, layer: nn.Module, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.operation = layer, operation
        self.calls: list[
            dict[str, Any]
        ] = []  # arguments of each call of the operation on the weight
        self.others: list[str] = []  # what else read the weight

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs `func`, and notes it if it reads the weight."""
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
            # A result that is the weight itself tells nothing: `weight.to(x.dtype)` gives the very same tensor.
            self.others.append(name)
        return result


def _arguments(args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a convolution or linear operation by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return {**dict(zip(names, args, strict=False)), **kwargs}


@torch.no_grad()
def _probe(layer: nn.Module, x: Tensor) -> WeightReads:
    """Runs a copy of `layer` in evaluation mode on `x` and returns how its weight was read."""
    base = base_layer(type(layer))
    assert base is not None
    own = copy.deepcopy(layer).eval()
    reads = WeightReads(own, OPERATIONS[base])
    with torch.random.fork_rng(devices=[]), reads:
        own.forward(x)  # not its hooks: whoever watches the layer must not be called again
    return reads


def why_not_plain(layer: nn.Module) -> str | None:
    """Says what the forward of a subclass does beyond the plain one; None if it only prepares its input.

    Its weight may be read once, by the layer's own operation, together with its own bias; and what the operation gets
    must be made of values of the input and zeros (padding before a convolution), so that rounding the input before
    or after that is the same.
    """
    base = base_layer(type(layer))
    assert base is not None
    more = [n for n, p in layer.named_parameters() if n not in ("weight", "bias") and p.dim() > 1]
    if more:
        return f"it has weights beside its own ('{more[0]}')"
    x = _made_up(layer)
    try:
        reads = _probe(layer, x)
        coarse = _probe(layer, _coarse(x))
    except Exception as problem:  # a stranger's forward may want anything
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        return f"it does not run on an ordinary input ({first[:120]})"
    if reads.others:
        return f"it reads its weight by '{reads.others[0]}'"
    if len(reads.calls) != 1 or len(coarse.calls) != 1:
        return f"it uses its weight {len(reads.calls)} times in one forward"
    call = reads.calls[0]
    if (call.get("bias") is None) != (layer._parameters.get("bias") is None):
        return "it adds its bias in its own way"
    given, rounded = call["input"], coarse.calls[0]["input"]
    if given.shape != rounded.shape or not torch.equal(_coarse(given), rounded):
        return "it changes the values of its input"
    return None


def plain_equivalent(layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Returns a plain layer and the input that give what a subclass's operation gives for its input `x`.

    The weight of the plain layer has no values, only a shape.
    """
    call = _probe(layer, x).calls[0]
    base, given = base_layer(type(layer)), call["input"]
    assert base is not None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    out, each, *kernel = weight.shape
    if base is nn.Linear:
        return nn.Linear(each, out, device="meta"), given
    groups = call.get("groups", 1)
    geometry = {
        key: call.get(key, usual) for key, usual in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    plain = base(each * groups, out, tuple(kernel), groups=groups, device="meta", **geometry)
    return plain, given


def _made_up(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    assert isinstance(layer.weight, Tensor)
    device = layer.weight.device
    if isinstance(layer, nn.Linear):
        return torch.randn(2, layer.in_features, generator=generator).to(device)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    sides = [(k - 1) * d + 4 + k for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return torch.randn(2, layer.in_channels, *sides, generator=generator).to(device)


def _coarse(x: Tensor) -> Tensor:
    """Rounds to quarters: a grid that holds 0."""
    return (x * 4).round() / 4
