"""Layers whose weights, and if wanted inputs, lie on a grid of a few bits: the quantized model on the torch side.

A grid is a rule for rounding; its scales are tensors of the layer. `weight` stays a float tensor: while a model
trains it is the latent weight, of which the layer uses the nearest grid point (the gradient passes straight through);
`settle_` moves it there, and then every weight is a whole number times its scale, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.grids import (
    LayerGrids,
    WeightGrid,
    affine,
    even_codebook,
    first_scale,
    mended,
    nearest_codes,
    pace,
    positive,
    slowed,
    spread,
    through,
    value_of,
)


class QuantLayer(nn.Module):
    """What the quantized layers have in common; `quantize_layers_` makes them of plain ones.

    Tensors, all in the state dict: `weight_scale` [out] or [out, groups], float32 (of a codebook with `centroid_bits`:
    0-d), `codebook` [2^bits], `input_scale` and `input_zero_point` (0-d float32, the latter a whole number). Scales are
    parameters: training moves them by the learned step size (Esser et al. 2020, arXiv:1902.08153, section 2).
    """

    weight: Tensor
    weight_scale: Tensor
    codebook: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    grids: LayerGrids = LayerGrids()

    def codes(self) -> Tensor:
        """Returns the int8 code of every weight, in the shape of `weight`: its nearest grid point.

        Raises:
            ModelError: if the weights are float, or one is not finite.
        """
        grid = self._grid()
        weight = self.weight.detach().float()
        if not bool(weight.isfinite().all()):
            raise ModelError(
                "a weight is NaN or infinite and has no code; load a checkpoint from before training broke"
            )
        return nearest_codes(weight, self._spread(), grid).to(torch.int8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Returns the float32 weights of `codes`.

        Raises:
            ModelError: if the weights are float, or a code is outside of the grid.
        """
        grid = self._grid()
        if codes.numel() and (int(codes.min()) < grid.lowest or int(codes.max()) > grid.highest):
            raise ModelError(
                f"codes are in {int(codes.min())}..{int(codes.max())}, but a grid of kind '{grid.kind}' with "
                f"{grid.bits} bits has {grid.lowest}..{grid.highest}; they belong to another model"
            )
        return value_of(codes.float(), self._spread(), grid).detach()

    def integers(self) -> tuple[Tensor, Tensor] | None:
        """Returns whole numbers (int8, as `weight`) and scales [out] or [out, groups] whose product the weights are.

        None if there are none: float weights, or a codebook of any values.
        """
        grid = self.grids.weights
        if grid is None or (grid.kind == "codebook" and grid.centroid_bits is None):
            return None
        if grid.kind != "codebook":
            return self.codes(), positive(self.weight_scale.detach())
        scale = positive(self.weight_scale.detach())
        return torch.round(self.dequantize(self.codes()) / scale).to(torch.int8), scale.expand(len(self.weight)).clone()

    def quantized_weight(self) -> Tensor:
        """Returns the grid points of the weights, differentiable in weights, scales and codebook."""
        grid = self.grids.weights
        if grid is None:
            return self.weight
        weight = self.weight.float()
        if grid.kind == "codebook":
            values = self._values()
            code = nearest_codes(weight.detach(), values.detach(), grid)
            # Both learn: the weight may change its cluster, and a centroid feels the mean of its weights' gradients.
            chosen = slowed(values, len(values) / weight.numel())[(code - grid.lowest).long()]
            return chosen + (weight - weight.detach())
        scale = self._spread(slow=True)
        if grid.kind == "binary":
            sign = nearest_codes(weight.detach(), scale.detach(), grid)
            return sign * scale + (weight - weight.detach())
        steps = (weight / scale).clamp(grid.lowest, grid.highest)
        return through(steps.detach().round(), steps) * scale

    def quantized_input(self, x: Tensor) -> Tensor:
        """Returns the grid points of the inputs `x`, differentiable in `x` and the scale."""
        grid = self.grids.inputs
        if grid is None or x.numel() == 0:
            return x  # a batch of nothing has no range
        x = x.float()
        if grid.bits == 1:
            size = x.detach().abs().mean() if grid.dynamic else slowed(positive(self.input_scale), pace(x, 1))
            near = x.clamp(-1, 1)  # the gradient of the sign is that of hard tanh (XNOR-Net, section 3)
            return through(torch.where(x.detach() >= 0, 1.0, -1.0), near) * size
        if grid.dynamic:
            scale, zero = affine(x.detach().amin(), x.detach().amax(), grid)
        else:
            scale, zero = slowed(positive(self.input_scale), pace(x, grid.highest)), self.input_zero_point
        steps = (x / scale).clamp(-zero, grid.highest - zero)
        return through(steps.detach().round(), steps) * scale

    def extra_repr(self) -> str:
        """Adds the grids to what torch prints."""
        told = [f"{k}={v.kind if isinstance(v, WeightGrid) else 'int'}{v.bits}" for k, v in self.grids if v is not None]
        return ", ".join([super().extra_repr(), *told])

    def _grid(self) -> WeightGrid:
        if self.grids.weights is None:
            raise ModelError(
                "the weights of this layer are float and have no codes; ask only layers with grids.weights"
            )
        return self.grids.weights

    def _values(self) -> Tensor:
        """The codebook, ascending; on its own grid if it has one."""
        grid = self._grid()
        values = self.codebook.float().sort().values
        values = values * (values.detach() != 0)  # no gradient: 0 stays, and with it the pruned weights
        if grid.centroid_bits is None:
            return values
        most, scale = 2 ** (grid.centroid_bits - 1) - 1, positive(self.weight_scale).detach()
        steps = (values / scale).clamp(-most, most)
        return through(steps.detach().round(), steps) * scale

    def _spread(self, *, slow: bool = False) -> Tensor:
        """The scale of every weight, to be broadcast, or the codebook; `slow` with the gradient of a learned step."""
        grid = self._grid()
        if grid.kind == "codebook":
            return self._values()
        scale = positive(self.weight_scale)
        if slow:
            pace = (scale.numel() / (max(1, self.weight.numel()) * grid.highest)) ** 0.5
            scale = slowed(scale, pace)
        return spread(scale, self.weight, grid.group)


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer on grids."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A convolution over sequences on grids."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, L] to [n, out_channels, L']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A convolution over images on grids."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, H, W] to [n, out_channels, H', W']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv3d(QuantLayer, nn.Conv3d):
    """A convolution over volumes on grids."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, D, H, W] to [n, out_channels, D', H', W']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


KINDS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
}


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yields every quantized layer with its name, a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def why_not(module: nn.Module) -> str | None:
    """Says why `module`, which has weights, cannot be put on a grid; None if it can."""
    if isinstance(module, QuantLayer):
        return None
    computed = "weight" not in module._parameters and (hasattr(module, "parametrizations") or type(module) in KINDS)
    if computed:
        return (
            "its weight is computed from other parameters; make it plain first (remove_parametrizations, prune.remove)"
        )
    if type(module) not in KINDS:
        base = next((k.__name__ for k in KINDS if isinstance(module, k)), None)
        return f"{type(module).__name__} computes in its own way" + (f", unlike {base}" if base else "")
    kind = getattr(module.weight, "dtype", torch.float32)
    return (
        None if kind == torch.float32 else f"its weights are {kind}, but grids hold float32; call model.float() first"
    )


@torch.no_grad()
def quantize_layers_(model: nn.Module, table: Mapping[str, LayerGrids]) -> None:
    """Puts the named layers on their grids; weights stay as they are, new scales span what the weights are now.

    A layer that is quantized already takes the new grids. Make the optimizer afterwards.

    Raises:
        ModelError: if a name is not in the model, or its layer cannot be quantized.
    """
    for name, grids in table.items():
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ModelError(
                f"spec.quantized: the model has no layer '{name}'; the spec is of another model"
            ) from error
        if reason := why_not(module):
            raise ModelError(f"spec.quantized: '{name}' cannot be quantized: {reason}; leave it out")
        for old in ("weight_scale", "codebook", "input_scale", "input_zero_point"):
            module._parameters.pop(old, None)
            module._buffers.pop(old, None)
        module.__class__ = KINDS.get(type(module), type(module))  # the same object: whoever shares it goes along
        assert isinstance(module, QuantLayer)
        module.grids = grids
        _register_(module, grids)
    _close_shortcuts_(model)


def _close_shortcuts_(model: nn.Module) -> None:
    """Lets torch's transformer encoders call their layers: their fast path reads the weights past a layer's forward."""
    for module in model.modules():
        if not any(isinstance(m, QuantLayer) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # as for any other activation; `activation` itself is what is used
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _register_(layer: QuantLayer, grids: LayerGrids) -> None:
    weight = layer.weight.detach()
    if (grid := grids.weights) is not None:
        if grid.kind == "codebook":
            layer.register_parameter("codebook", nn.Parameter(even_codebook(weight, grid)))
            if grid.centroid_bits is not None:
                top = weight.detach().abs().amax().float() / (2 ** (grid.centroid_bits - 1) - 1)
                layer.register_parameter("weight_scale", nn.Parameter(mended(top), requires_grad=False))
        else:
            layer.register_parameter("weight_scale", nn.Parameter(first_scale(weight, grid)))
    if (inputs := grids.inputs) is not None and not inputs.dynamic:
        layer.register_parameter("input_scale", nn.Parameter(weight.new_ones((), dtype=torch.float32)))
        layer.register_buffer("input_zero_point", weight.new_zeros((), dtype=torch.float32))


@torch.no_grad()
def settle_(model: nn.Module) -> nn.Module:
    """Moves every weight on a grid to its grid point: then `weight == dequantize(codes())` to the bit.

    What the model computes stays the same to the bit. Returns the model.

    Raises:
        ModelError: if a weight is not finite, naming the layer.
    """
    for name, layer in quantized_layers(model):
        if layer.grids.weights is None:
            continue
        try:
            codes = layer.codes()
        except ModelError as error:
            raise ModelError(f"'{name}': {error}") from error
        layer.weight.copy_(layer.dequantize(codes))
        if layer.grids.weights.kind == "codebook":
            layer.codebook.copy_(layer._values())
        if "weight_scale" in layer._parameters:
            layer.weight_scale.copy_(positive(layer.weight_scale))
    return model


@torch.no_grad()
def fold_layers_(model: nn.Module, folded: Mapping[str, str]) -> None:
    """Gives the layers that took in a batch norm a bias of zeros where they have none, and empties the batch norms.

    Args:
        model: changed in place.
        folded: the name of each batch norm -> the name of the convolution or linear layer before it.

    Raises:
        ModelError: if a name is not in the model, or its module is of another kind.
    """
    for norm, into in folded.items():
        owner, _, key = norm.rpartition(".")
        try:
            parent, layer = model.get_submodule(owner), model.get_submodule(into)
            inner = model.get_submodule(norm)
        except AttributeError as error:
            raise ModelError(
                f"spec.folded: the model lacks '{norm}' or '{into}'; the spec is of another model"
            ) from error
        weight = layer._parameters.get("weight")
        if not isinstance(inner, nn.modules.batchnorm._BatchNorm | nn.Identity) or weight is None:
            raise ModelError(f"spec.folded: '{norm}' cannot be folded into '{into}'; the spec is of another model")
        if layer._parameters.get("bias") is None:
            outputs = getattr(layer, "out_channels", len(weight))
            layer.register_parameter("bias", nn.Parameter(weight.detach().new_zeros(outputs)))
        parent._modules[key] = nn.Identity()
