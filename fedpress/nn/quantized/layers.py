"""Quantized versions of torch's layers: `QuantLinear`, `QuantConv2d`, `QuantLSTM` and others."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.nn.quantized.layer import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):
    """A quantized linear layer."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """Maps [..., in_features] to [..., out_features]."""
        return F.linear(self.quantized_input(input), self.quantized_weight(), self.bias)


class QuantConv1d(QuantLayer, nn.Conv1d):
    """A quantized 1-d convolution, over sequences."""

    plain = nn.Conv1d
    # Channel axis of the inputs, counted from the end: [n, in_channels, L].
    channel_axis = -2

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, L] to [n, out_channels, L']."""
        x = self.quantized_input(input)
        # torch's own method, which also applies the padding mode.
        out: Tensor = self._conv_forward(x, self.quantized_weight(), self.bias)
        return out


class QuantConv2d(QuantLayer, nn.Conv2d):
    """A quantized 2-d convolution, over images."""

    plain = nn.Conv2d
    channel_axis = -3

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, H, W] to [n, out_channels, H', W']."""
        x = self.quantized_input(input)
        out: Tensor = self._conv_forward(x, self.quantized_weight(), self.bias)
        return out


class QuantConv3d(QuantLayer, nn.Conv3d):
    """A quantized 3-d convolution, over volumes."""

    plain = nn.Conv3d
    channel_axis = -4

    def forward(self, input: Tensor) -> Tensor:
        """Maps [n, in_channels, D, H, W] to [n, out_channels, D', H', W']."""
        x = self.quantized_input(input)
        out: Tensor = self._conv_forward(x, self.quantized_weight(), self.bias)
        return out


class _QuantTransposed(QuantLayer):
    """A quantized transposed convolution, with weight [in, out / groups, ...].

    Each output channel has a scale, so `rows` reorders the weight to have outputs first.
    """

    groups: int

    def rows(self, weight: Tensor) -> Tensor:
        """Returns a weight as [out, in / groups, ...]."""
        by_group: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1)

    def unrows(self, rows: Tensor) -> Tensor:
        """Returns rows as [in, out / groups, ...]."""
        by_group: Tensor = rows.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Maps [n, in_channels, ...] to [n, out_channels, ...]."""
        # torch's own forward, because it computes the padding of the output from `output_size`.
        twin = self.plain_twin(weight=self.quantized_weight())
        found: Tensor = twin.forward(self.quantized_input(input), output_size)
        return found


class QuantConvTranspose1d(_QuantTransposed, nn.ConvTranspose1d):
    """A quantized transposed convolution over sequences."""

    plain = nn.ConvTranspose1d
    channel_axis = -2


class QuantConvTranspose2d(_QuantTransposed, nn.ConvTranspose2d):
    """A quantized transposed convolution over images."""

    plain = nn.ConvTranspose2d
    channel_axis = -3


class QuantConvTranspose3d(_QuantTransposed, nn.ConvTranspose3d):
    """A quantized transposed convolution over volumes."""

    plain = nn.ConvTranspose3d
    channel_axis = -4


class QuantEmbedding(QuantLayer, nn.Embedding):
    """A quantized embedding table with a scale for each row."""

    plain = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Maps ids [...] to vectors [..., embedding_dim]."""
        # `max_norm` and sparse gradients are refused when a layer is quantized.
        return F.embedding(input, self.quantized_weight(), self.padding_idx)


class _QuantRecurrent(QuantLayer):
    """An LSTM, GRU or RNN with quantized weights; its inputs and states stay float."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Maps a sequence and a state to outputs and the last state, as torch's layer does."""
        weights = {key: self.quantized_weight(key) for key in self.keys}
        names: list[str] = self._flat_weights_names  # type: ignore[assignment]
        # torch's kernel gets this list, not the attributes.
        flat = []
        for name in names:
            flat.append(weights[name] if name in weights else getattr(self, name))
        return self.plain_twin(_flat_weights=flat, **weights).forward(input, hx)


class QuantLSTM(_QuantRecurrent, nn.LSTM):
    """A quantized LSTM."""

    plain = nn.LSTM


class QuantGRU(_QuantRecurrent, nn.GRU):
    """A quantized GRU."""

    plain = nn.GRU


class QuantRNN(_QuantRecurrent, nn.RNN):
    """A quantized Elman network."""

    plain = nn.RNN


class _QuantCell(QuantLayer):
    """One step of a quantized recurrent layer; its inputs and states stay float."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Maps an input and a state to the next state, as torch's cell does."""
        weights = {key: self.quantized_weight(key) for key in self.keys}
        return self.plain_twin(**weights).forward(input, hx)


class QuantLSTMCell(_QuantCell, nn.LSTMCell):
    """One step of a quantized LSTM."""

    plain = nn.LSTMCell


class QuantGRUCell(_QuantCell, nn.GRUCell):
    """One step of a quantized GRU."""

    plain = nn.GRUCell


class QuantRNNCell(_QuantCell, nn.RNNCell):
    """One step of a quantized Elman network."""

    plain = nn.RNNCell


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """Attention with quantized projections of queries, keys and values.

    The output projection `out_proj` is a separate quantized layer with its own scheme.
    """

    plain = nn.MultiheadAttention

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes attention as `nn.MultiheadAttention` does, with the same arguments."""
        parts: dict[str, object] = {key: self.quantized_weight(key) for key in self.keys}
        # Attention uses the weight of `out_proj` without calling it, so it must be rounded here.
        if isinstance(self.out_proj, QuantLayer):
            parts["out_proj"] = self.out_proj.plain_twin(weight=self.out_proj.quantized_weight())
        return self.plain_twin(**parts).forward(*args, **kwargs)


# Exact classes: a subclass may compute something else, so `fedpress.nn.quantized.classes` checks
# subclasses separately.
QUANTIZED_CLASSES: dict[type[nn.Module], type[QuantLayer]] = {
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
"""Layer class of torch -> its quantized class."""
INPUT_QUANTIZED = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose inputs can be quantized; of the others only the weights are rounded."""
