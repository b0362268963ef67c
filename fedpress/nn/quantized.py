"""Layers whose weights, and if wanted inputs, lie on a grid of a few bits: the quantized model on the torch side.

A grid is a rule for rounding; its scales are tensors of the layer. `weight` stays a float tensor: while a model
trains it is the latent weight, of which the layer uses the nearest grid point (the gradient passes straight through);
`settle_` moves it there, and then every weight is a whole number times its scale, to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn import forwards
from fedpress.nn.quant_scheme import (
    TINY,
    InputGrid,
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

WINDOW = 1.25
"""One-bit inputs: the gradient passes up to so many mean distances from the middle, of a Gaussian its deviation."""


class QuantLayer(nn.Module):
    """What the quantized layers have in common; `quantize_layers_` makes them of plain ones.

    A layer has one weight, `weight`, or several, such as `weight_ih_l0` and `weight_hh_l0`; `keys` are their names.
    Tensors, all in the state dict: `weight_scale` [out] or [out, groups], float32 (of a codebook with `centroid_bits`:
    0-d), `codebook` [2^bits]; of another weight `KEY_scale` and `KEY_codebook`. Of the inputs: `input_scale` and
    `input_zero_point` (0-d float32, the latter a whole number), `input_middle` [channels] (see `InputGrid`). Scales are
    parameters: training moves them by the learned step size (Esser et al. 2020, arXiv:1902.08153, section 2).
    """

    weight: Tensor
    weight_scale: Tensor
    codebook: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_middle: Tensor
    grids: LayerGrids = LayerGrids()
    plain: type[nn.Module] = nn.Module  # the class of the layer before it was quantized
    channel_axis = -1  # of the inputs

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the weights that lie on the grid."""
        return weight_keys(self)

    @property
    def size(self) -> int:
        """Number of entries of all its weights."""
        return sum(getattr(self, key).numel() for key in self.keys)

    def rows(self, weight: Tensor) -> Tensor:
        """Returns `weight` with output channels first: the form in which a scale belongs to a row."""
        return weight

    def unrows(self, rows: Tensor) -> Tensor:
        """Takes `rows` back to the form that the layer gives its weight."""
        return rows

    def scale(self, key: str = "weight") -> nn.Parameter:
        """Returns the scales of a weight, as they are trained; `positive` of them are used."""
        found: nn.Parameter = getattr(self, scale_name(key))
        return found

    def codebook_of(self, key: str = "weight") -> nn.Parameter:
        """Returns the values that the entries of a weight share."""
        found: nn.Parameter = getattr(self, codebook_name(key))
        return found

    def codes(self, key: str = "weight") -> Tensor:
        """Returns the int8 code of every entry of a weight, in its shape: its nearest grid point.

        Raises:
            ModelError: if the weights are float, or one is not finite.
        """
        grid = self._grid()
        weight = self.rows(getattr(self, key).detach().float())
        if not bool(weight.isfinite().all()):
            raise ModelError(
                "a weight is NaN or infinite and has no code; load a checkpoint from before training broke"
            )
        return self.unrows(nearest_codes(weight, self._spread(key), grid)).to(torch.int8)

    def dequantize(self, codes: Tensor, key: str = "weight") -> Tensor:
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
        return self.unrows(value_of(self.rows(codes.float()), self._spread(key), grid)).detach()

    def integers(self, key: str = "weight") -> tuple[Tensor, Tensor] | None:
        """Returns whole numbers (int8, as `weight`) and scales [out] or [out, groups] whose product the weights are.

        None if there are none: float weights, or a codebook of any values.
        """
        grid = self.grids.weights
        if grid is None or (grid.kind == "codebook" and grid.centroid_bits is None):
            return None
        scale = positive(self.scale(key).detach())
        if grid.kind != "codebook":
            return self.codes(key), scale
        whole = torch.round(self.dequantize(self.codes(key), key) / scale).to(torch.int8)
        return whole, scale.expand(len(self.rows(whole))).clone()

    def quantized_weight(self, key: str = "weight") -> Tensor:
        """Returns the grid points of a weight, differentiable in weights, scales and codebook."""
        grid = self.grids.weights
        if grid is None:
            latent: Tensor = getattr(self, key)
            return latent
        weight = self.rows(getattr(self, key).float())
        if grid.kind == "codebook":
            values = self._values(key)
            code = nearest_codes(weight.detach(), values.detach(), grid)
            # Both learn: the weight may change its cluster, and a centroid feels the sum of its weights' gradients
            # (Han et al. 2016, section 3.3), here times clusters / weights: their mean, were all clusters as large.
            chosen = slowed(values, len(values) / weight.numel())[(code - grid.lowest).long()]
            return self.unrows(chosen + (weight - weight.detach()))
        scale = self._spread(key, slow=True)
        if grid.kind == "binary":
            sign = nearest_codes(weight.detach(), scale.detach(), grid)
            return self.unrows(sign * scale + (weight - weight.detach()))
        steps = (weight / scale).clamp(grid.lowest, grid.highest)
        return self.unrows(through(steps.detach().round(), steps) * scale)

    def quantized_input(self, x: Tensor) -> Tensor:
        """Returns the grid points of the inputs `x`, differentiable in `x`, the scale and the middle."""
        grid = self.grids.inputs
        if grid is None or x.numel() == 0:
            return x  # a batch of nothing has no range
        x = x.float()
        if grid.bits == 1:
            return self._side(x, grid)
        if grid.dynamic:
            whole = [*range(x.dim())]  # ONNX has no least value without axes
            scale, zero = affine(x.detach().amin(whole), x.detach().amax(whole), grid)
        else:
            scale, zero = (
                slowed(positive(self.input_scale), pace(x, grid.highest)),
                self.input_zero_point,
            )
        steps = (x / scale).clamp(-zero, grid.highest - zero)
        return through(steps.detach().round(), steps) * scale

    def _side(self, x: Tensor, grid: InputGrid) -> Tensor:
        """One bit: on which side of the middle a value lies, times the mean distance from it."""
        middle = self.middle() if grid.middle else None
        away = x if middle is None else x - middle
        size = (
            away.detach().abs().mean()
            if grid.dynamic
            else slowed(positive(self.input_scale), pace(x, 1))
        )
        # Without a middle the inputs are taken for normalised ones: the gradient passes where |x| <= 1, that of hard
        # tanh (Hubara et al. 2016, arXiv:1602.02830, eq. 4). With one, `size` says how wide their spread is.
        near = (
            away.clamp(-1, 1)
            if middle is None
            else (away / (WINDOW * size.detach().clamp_min(TINY))).clamp(-1, 1)
        )
        side = through(torch.where(away.detach() >= 0, 1.0, -1.0), near) * size
        return side if middle is None else side + middle

    def middle(self) -> Tensor:
        """Returns the middle of each channel of one-bit inputs, in a shape that is taken from inputs."""
        return self.input_middle.view(-1, *[1] * (-1 - self.channel_axis))

    def extra_repr(self) -> str:
        """Adds the grids to what torch prints."""
        told = [
            f"{k}={v.kind if isinstance(v, WeightGrid) else 'int'}{v.bits}"
            for k, v in self.grids
            if v is not None
        ]
        return ", ".join([super().extra_repr(), *told])

    def _grid(self) -> WeightGrid:
        if self.grids.weights is None:
            raise ModelError(
                "the weights of this layer are float and have no codes; ask only layers with grids.weights"
            )
        return self.grids.weights

    def _values(self, key: str = "weight") -> Tensor:
        """The codebook, ascending; on its own grid if it has one."""
        grid = self._grid()
        values = self.codebook_of(key).float().sort().values
        values = values * (
            values.detach() != 0
        )  # no gradient: 0 stays, and with it the pruned weights
        if grid.centroid_bits is None:
            return values
        most, scale = 2 ** (grid.centroid_bits - 1) - 1, positive(self.scale(key)).detach()
        steps = (values / scale).clamp(-most, most)
        return through(steps.detach().round(), steps) * scale

    def _spread(self, key: str = "weight", *, slow: bool = False) -> Tensor:
        """The scale of every entry, to be broadcast over rows, or the codebook; `slow`: the gradient of a step size."""
        grid = self._grid()
        if grid.kind == "codebook":
            return self._values(key)
        scale = positive(self.scale(key))
        weight: Tensor = getattr(self, key)
        if slow:
            pace = (scale.numel() / (max(1, weight.numel()) * grid.highest)) ** 0.5
            scale = slowed(scale, pace)
        return spread(scale, self.rows(weight), grid.group)

    def _twin(self, **instead: object) -> Any:
        """Returns a plain layer of the same parts, with other attributes in the place of some.

        Its forward is that of the class before quantization, which so reads the grid points of its weights. Nothing is
        changed in this layer: a gradient, a trace or a copy of it never meets a half-quantized state.
        """
        twin = object.__new__(self.plain)
        twin.__dict__.update(self.__dict__)
        twin.__dict__.update(instead)
        return twin


class QuantLinear(QuantLayer, nn.Linear):
    """A linear layer on grids."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A convolution over sequences on grids."""

    plain, channel_axis = nn.Conv1d, -2

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, L] to [n, out_channels, L']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A convolution over images on grids."""

    plain, channel_axis = nn.Conv2d, -3

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, H, W] to [n, out_channels, H', W']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv3d(QuantLayer, nn.Conv3d):
    """A convolution over volumes on grids."""

    plain, channel_axis = nn.Conv3d, -4

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, D, H, W] to [n, out_channels, D', H', W']."""
        return self._conv_forward(self.quantized_input(input), self.quantized_weight(), self.bias)


class _QuantTransposed(QuantLayer):
    """A transposed convolution on grids: weight [in, out / groups, ...], rows [out, in / groups, ...]."""

    groups: int

    @property
    def size(self) -> int:
        """Number of entries of all its weights."""
        return sum(getattr(self, key).numel() for key in self.keys)

    def rows(self, weight: Tensor) -> Tensor:
        """Returns [out, in / groups, ...]."""
        whole = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return whole.flatten(0, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """Returns [in, out / groups, ...]."""
        whole = rows.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return whole.flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps [n, in_channels, ...] to [n, out_channels, ...]."""
        twin = self._twin(weight=self.quantized_weight())
        found: Tensor = twin.forward(self.quantized_input(input), output_size)
        return found


class QuantConvTranspose1d(_QuantTransposed, nn.ConvTranspose1d):
    """A transposed convolution over sequences on grids."""

    plain, channel_axis = nn.ConvTranspose1d, -2


class QuantConvTranspose2d(_QuantTransposed, nn.ConvTranspose2d):
    """A transposed convolution over images on grids."""

    plain, channel_axis = nn.ConvTranspose2d, -3


class QuantConvTranspose3d(_QuantTransposed, nn.ConvTranspose3d):
    """A transposed convolution over volumes on grids."""

    plain, channel_axis = nn.ConvTranspose3d, -4


class QuantEmbedding(QuantLayer, nn.Embedding):
    """A table of vectors on grids, a scale for each row."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Maps ids [...] to vectors [..., embedding_dim]."""
        return F.embedding(input, self.quantized_weight(), self.padding_idx)


class _QuantRecurrent(QuantLayer):
    """An LSTM, GRU or RNN whose weights are on grids; its inputs and states stay float."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Maps a sequence and a state to outputs and the last state, as the plain layer."""
        weights = {key: self.quantized_weight(key) for key in self.keys}
        names: list[str] = self._flat_weights_names  # type: ignore[assignment]
        flat = [weights[n] if n in weights else getattr(self, n) for n in names]
        return self._twin(_flat_weights=flat, **weights).forward(input, hx)


class QuantLSTM(_QuantRecurrent, nn.LSTM):
    """An LSTM on grids."""

    plain = nn.LSTM


class QuantGRU(_QuantRecurrent, nn.GRU):
    """A GRU on grids."""

    plain = nn.GRU


class QuantRNN(_QuantRecurrent, nn.RNN):
    """An Elman network on grids."""

    plain = nn.RNN


class _QuantCell(QuantLayer):
    """One step of a recurrent layer on grids."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Maps an input and a state to the next state, as the plain cell."""
        return self._twin(**{key: self.quantized_weight(key) for key in self.keys}).forward(
            input, hx
        )


class QuantLSTMCell(_QuantCell, nn.LSTMCell):
    """One step of an LSTM on grids."""

    plain = nn.LSTMCell


class QuantGRUCell(_QuantCell, nn.GRUCell):
    """One step of a GRU on grids."""

    plain = nn.GRUCell


class QuantRNNCell(_QuantCell, nn.RNNCell):
    """One step of an Elman network on grids."""

    plain = nn.RNNCell


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """Attention whose projections of queries, keys and values are on grids.

    The output projection is a layer of its own in the table of grids. Attention reads its weight without calling it.
    """

    plain = nn.MultiheadAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attends as the plain layer does."""
        parts: dict[str, object] = {key: self.quantized_weight(key) for key in self.keys}
        if isinstance(self.out_proj, QuantLayer):
            parts["out_proj"] = self.out_proj._twin(weight=self.out_proj.quantized_weight())
        return self._twin(**parts).forward(*args, **kwargs)


class _QuantSubclass(QuantLayer):
    """A layer of a subclass whose forward is the plain one behind what it does to its input (see `forwards`)."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Maps what the plain layer maps."""
        twin = self._twin(weight=self.quantized_weight())
        return twin.forward(self.quantized_input(input), *args, **kwargs)


KINDS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
    nn.RNN: QuantRNN,
    nn.LSTMCell: QuantLSTMCell,
    nn.GRUCell: QuantGRUCell,
    nn.RNNCell: QuantRNNCell,
    nn.MultiheadAttention: QuantMultiheadAttention,
}
ROUND_INPUTS = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers that may have grids for their inputs; of the others only the weights are rounded."""


def quantized_kind(kind: type[nn.Module]) -> type[QuantLayer]:
    """Returns the quantized form of a kind of layer; that of a subclass is made here.

    Raises:
        KeyError: if there is none.
    """
    found = KINDS.get(kind) or _SUBCLASSES.get(kind)
    if found is not None:
        return found
    same = _same_as(kind)
    base = same or forwards.base_of(kind)
    if base is None:
        raise KeyError(kind)
    parts = {
        "plain": kind,
        "channel_axis": KINDS[base].channel_axis,
        "__doc__": f"{kind.__name__} on grids.",
    }
    own = KINDS[base] if same else _QuantSubclass
    made = _SUBCLASSES[kind] = type(f"Quant{kind.__name__}", (own, kind), parts)
    return made


def _same_as(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the layer that a subclass computes like, since it changes nothing but how it is made.

    Only what the layer itself does not have may be added: a function of the layer that is replaced may be a part of its
    forward.
    """
    base = next((k for k in KINDS if issubclass(kind, k)), None)
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
"""What `quantized_kind` has made: two layers of one class stay of one class."""


def weight_keys(module: nn.Module) -> tuple[str, ...]:
    """Returns the names of the weights of a layer, those that go on a grid."""
    if isinstance(module, nn.RNNBase):
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))
    if isinstance(module, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(module, nn.MultiheadAttention):
        whole = module._qkv_same_embed_dim
        return ("in_proj_weight",) if whole else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ("weight",)


def scale_name(key: str) -> str:
    """Returns the name of the scales of a weight."""
    return f"{key}_scale"


def codebook_name(key: str) -> str:
    """Returns the name of the codebook of a weight."""
    return "codebook" if key == "weight" else f"{key}_codebook"


def zeros_name(key: str) -> str:
    """Returns the name of the buffer that tells rounded zeros of a weight from pruned ones."""
    return f"{key}_kept_zeros"


def is_step(name: str) -> bool:
    """Whether the tensor of this name belongs to a grid: a scale, a codebook, a zero point or a middle.

    >>> is_step("gru.weight_hh_l0_scale"), is_step("conv.weight")
    (True, False)
    """
    leaf = name.rpartition(".")[2]
    return leaf in INPUT_TENSORS or bool(STEP.fullmatch(leaf))


INPUT_TENSORS = ("input_scale", "input_zero_point", "input_middle")
STEP = re.compile(r"codebook|\w*weight\w*_(scale|codebook)")


def step_sizes(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that are grids of quantized layers: no weight decay may pull at them.

    A smaller step size is no smaller network: decay would only draw the grid away from where training put it.
    """
    found: set[int] = set()
    for _, layer in quantized_layers(model):
        found |= {id(p) for name, p in layer.named_parameters(recurse=False) if is_step(name)}
    return found


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Yields every quantized layer with its name, a shared one once."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def why_not(module: nn.Module) -> str | None:
    """Says why `module`, which has weights, cannot be put on a grid; None if it can.

    A subclass of a convolution or linear layer is run once on made-up inputs to see what it does with its weight.
    """
    if isinstance(module, QuantLayer):
        return None
    keys = weight_keys(module)
    same = type(module) in KINDS or _same_as(type(module)) is not None
    known = same or forwards.base_of(type(module)) is not None
    if any(key not in module._parameters for key in keys) and (
        hasattr(module, "parametrizations") or known
    ):
        cure = "make it plain first (remove_parametrizations, prune.remove)"
        return f"its weight is computed from other parameters; {cure}"
    if "forward" in module.__dict__:
        return "its forward was replaced by another function; quantize it before that"
    if not known:
        base = next((k.__name__ for k in KINDS if isinstance(module, k)), None)
        return f"{type(module).__name__} computes in its own way" + (
            f", unlike {base}" if base else ""
        )
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return (
            "it changes its rows itself (max_norm) or has sparse gradients, which grids do not take"
        )
    for key in keys:
        kind = getattr(module._parameters[key], "dtype", torch.float32)
        if kind != torch.float32:
            return f"its weights are {kind}, but grids hold float32; call model.float() first"
    if same:
        return None
    other = forwards.other_than_plain(module)
    return other and f"{type(module).__name__} computes in its own way: {other}"


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
            raise ModelError(
                f"spec.quantized: '{name}' cannot be quantized: {reason}; leave it out"
            )
        _drop_grids_(module)
        if not isinstance(module, QuantLayer):
            module.__class__ = quantized_kind(
                type(module)
            )  # the same object: whoever shares it goes along
        assert isinstance(module, QuantLayer)
        if not issubclass(module.plain, ROUND_INPUTS) and grids.inputs is not None:
            raise ModelError(
                f"spec.quantized: '{name}' is a {module.plain.__name__}, whose weights alone can be rounded; "
                "leave its inputs out"
            )
        module.grids = grids
        _register_(module, grids)
    _close_shortcuts_(model)


def _close_shortcuts_(model: nn.Module) -> None:
    """Lets torch's transformer encoders call their layers: their fast path reads the weights past a layer's forward."""
    for module in model.modules():
        if not any(isinstance(m, QuantLayer) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = (
                0  # as for any other activation; `activation` itself is what is used
            )
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def make_plain_(layer: QuantLayer) -> nn.Module:
    """Makes `layer` what it was before it was quantized, with the weights that it has now; returns it."""
    _drop_grids_(layer)
    _drop_kept_zeros_(layer)
    layer.__dict__.pop("grids", None)
    layer.__class__ = layer.plain  # type: ignore[assignment]
    return layer


def _drop_grids_(module: nn.Module) -> None:
    if not isinstance(module, QuantLayer):
        return
    for table in (module._parameters, module._buffers):
        for name in [name for name in table if is_step(name)]:
            table.pop(name)


def _drop_kept_zeros_(layer: QuantLayer) -> None:
    for key in layer.keys:
        layer._buffers.pop(zeros_name(key), None)


def _register_(layer: QuantLayer, grids: LayerGrids) -> None:
    if (grid := grids.weights) is not None:
        for key in layer.keys:
            _register_weight_(layer, key, grid)
    if (inputs := grids.inputs) is None:
        return
    first = layer.weight.detach()
    if not inputs.dynamic:
        layer.register_parameter(
            "input_scale", nn.Parameter(first.new_ones((), dtype=torch.float32))
        )
        layer.register_buffer("input_zero_point", first.new_zeros((), dtype=torch.float32))
    if inputs.middle:
        channels = int(getattr(layer, "in_channels", first.shape[1]))
        layer.register_parameter(
            "input_middle", nn.Parameter(first.new_zeros(channels, dtype=torch.float32))
        )


def _register_weight_(layer: QuantLayer, key: str, grid: WeightGrid) -> None:
    weight = layer.rows(getattr(layer, key).detach())
    if grid.kind != "codebook":
        layer.register_parameter(scale_name(key), nn.Parameter(first_scale(weight, grid)))
        return
    layer.register_parameter(codebook_name(key), nn.Parameter(even_codebook(weight, grid)))
    if grid.centroid_bits is not None:
        top = weight.abs().amax().float() / (2 ** (grid.centroid_bits - 1) - 1)
        layer.register_parameter(scale_name(key), nn.Parameter(mended(top), requires_grad=False))


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
        for key in layer.keys:
            try:
                codes = layer.codes(key)
            except ModelError as error:
                raise ModelError(f"'{name}': {error}") from error
            getattr(layer, key).copy_(layer.dequantize(codes, key))
            if layer.grids.weights.kind == "codebook":
                layer.codebook_of(key).copy_(layer._values(key))
            if scale_name(key) in layer._parameters:
                layer.scale(key).copy_(positive(layer.scale(key)))
    return model


def kept_entries(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns which entries of the named sparse weights are kept: bool, of the weights' shapes.

    A float weight keeps what is not 0. On a grid of few bits kept entries may be 0 too, since the grid has no nearer
    point: a buffer of the layer says which, so that training may move them again (see `note_kept_zeros_`).

    Raises:
        ModelError: if the model lacks one of the names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in parameters:
            raise ModelError(
                f"spec.sparse: the model has no parameter '{name}'; the spec is of another model"
            )
        kept = parameters[name].detach() != 0
        owner, _, key = name.rpartition(".")
        zeros = buffers.get(f"{owner}.{zeros_name(key)}" if owner else zeros_name(key))
        found[name] = kept if zeros is None else kept | zeros
    return found


def note_kept_zeros_(model: nn.Module, masks: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Writes down which zeros of sparse weights on grids are kept entries that were rounded to 0.

    Args:
        model: gets a buffer in each layer where there are such zeros; elsewhere the zeros are the mask.
        masks: the kept entries of each sparse weight, by name.

    Returns:
        The names of the weights with a buffer: `ModelSpec.kept_zeros`.
    """
    layers = {
        f"{name}.{key}": (layer, key)
        for name, layer in quantized_layers(model)
        for key in layer.keys
    }
    noted = []
    for name, mask in masks.items():
        if name not in layers:
            continue
        layer, key = layers[name]
        weight = getattr(layer, key).detach()
        zeros = mask.to(weight.device) & (weight == 0)
        layer._buffers.pop(zeros_name(key), None)
        if bool(zeros.any()):
            layer.register_buffer(zeros_name(key), zeros)
            noted.append(name)
    return tuple(noted)


def register_kept_zeros_(model: nn.Module, names: Iterable[str]) -> None:
    """Gives the layers of the named weights their buffers of kept zeros, empty, to be loaded.

    Raises:
        ModelError: if a name is no weight on a grid.
    """
    layers = {
        f"{name}.{key}": (layer, key)
        for name, layer in quantized_layers(model)
        for key in layer.keys
    }
    for name in names:
        if name not in layers:
            raise ModelError(
                f"spec.kept_zeros: '{name}' is no weight on a grid; the spec is of another model"
            )
        layer, key = layers[name]
        layer.register_buffer(
            zeros_name(key), torch.zeros_like(getattr(layer, key), dtype=torch.bool)
        )


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
            raise ModelError(
                f"spec.folded: '{norm}' cannot be folded into '{into}'; the spec is of another model"
            )
        if layer._parameters.get("bias") is None:
            outputs = getattr(layer, "out_channels", len(weight))
            layer.register_parameter("bias", nn.Parameter(weight.detach().new_zeros(outputs)))
        parent._modules[key] = nn.Identity()
