"""Normalisation layers: batch, group (with weight-standardised convolutions) or none, chosen by one word."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.nn.batch_norm import BatchNorm

Norm = Literal["batch", "group"]


class WSConv2d(nn.Conv2d):
    """A convolution whose filters are standardised before use (Qiao et al. 2019, arXiv:1903.10520)."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, C, H, W] to [n, out_channels, H', W']."""
        w = self.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(
            x,
            (w - mean) / (var + 1e-5).sqrt(),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


def conv(i: int, o: int, kernel: int, *, stride: int = 1, norm: Norm = "batch") -> nn.Conv2d:
    """Makes a same-padded convolution without bias; weight-standardised where group norm follows."""
    kind = WSConv2d if norm == "group" else nn.Conv2d
    return kind(i, o, kernel, stride=stride, padding=kernel // 2, bias=False)


def norm_layer(channels: int, norm: Norm) -> nn.Module:
    """Makes the normalisation of `channels` channels; group norm has at most 32 groups that divide them.

    Raises:
        ValueError: for any other word.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm != "group":
        raise ValueError(f"norm is {norm!r}; use 'batch' or 'group'")
    return nn.GroupNorm(
        next(g for g in range(min(32, channels), 0, -1) if channels % g == 0), channels
    )


def freeze_batch_norm_(model: nn.Module) -> nn.Module:
    """Puts every batch norm into evaluation mode: its statistics stay, its scale and bias train. `train()` undoes it.

    Valid under both privacy units, since no example influences another's output, and free of client drift.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model
