"""Normalisation layers by name: "batch", or "group" with weight-standardised convolutions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.errors import ModelError
from fedpress.nn.batch_norm import BatchNorm

Norm = Literal["batch", "group"]
"""The kind of normalisation layer."""


class WSConv2d(nn.Conv2d):
    """A weight-standardised convolution (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, C, H, W] to [n, out_channels, H', W']."""
        # Standardised in every forward pass, so that gradients flow through the standardisation.
        w = self.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, unbiased=False)
        standardised = (w - mean) / (var + 1e-5).sqrt()
        return F.conv2d(
            x,
            standardised,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


def conv(i: int, o: int, kernel: int, *, stride: int = 1, norm: Norm = "batch") -> nn.Conv2d:
    """Makes a convolution from `i` to `o` channels, padded by kernel // 2 and without bias.

    For `norm="group"` it is weight-standardised.
    """
    # No bias: the normalisation layer that follows adds one.
    kind = WSConv2d if norm == "group" else nn.Conv2d
    return kind(i, o, kernel, stride=stride, padding=kernel // 2, bias=False)


def norm_layer(channels: int, norm: Norm) -> nn.Module:
    """Makes a normalisation layer for `channels` channels.

    For "group", the number of groups is the largest number up to 32 that divides `channels`.

    Raises:
        ModelError: if `norm` is neither "batch" nor "group".
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm != "group":
        raise ModelError(f"got {norm!r}", place="norm", cure="use 'batch' or 'group'")
    groups = next(g for g in range(min(32, channels), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


def freeze_batch_norm_(model: nn.Module) -> nn.Module:
    """Puts every batch norm into evaluation mode: its statistics are fixed, scale and bias train.

    Then no example influences the output for another example, as per-example clipping requires.
    The statistics also stay the same on all clients. `model.train()` undoes the freezing. Returns
    `model`.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model
