"""Examples in memory, and the fixed step from raw examples to a network's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrays:
    """Examples `x` (uint8 images [n, C, H, W] or float32 features [n, ...]) with int64 labels `y` [n]."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"{len(self.x)} examples but {len(self.y)} labels; give one label per example")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Arrays:
        """Returns the examples at the int64 positions `index` [k]."""
        return Arrays(self.x[index], self.y[index])


@dataclass(frozen=True)
class Preprocess:
    """Standardises raw examples per channel (dimension 1); bytes are scaled to 0..1 first.

    >>> Preprocess((0.5,), (0.5,))(torch.tensor([[[[255]]]], dtype=torch.uint8)).item()
    1.0
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Returns float32 of the same shape as `x` [n, C, ...]."""
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        x = x.to(torch.float32)
        if not self.mean:
            return x / scale
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean = torch.tensor(self.mean, device=x.device).view(shape) * scale
        std = torch.tensor(self.std, device=x.device).view(shape) * scale
        return (x - mean) / std

    @classmethod
    def fit(cls, x: Tensor) -> Preprocess:
        """Takes the statistics per channel of public examples `x` [n, C, ...]; a constant channel gets std 1."""
        raw = cls()
        dims = [0, *range(2, x.dim())]
        count, total, square = 0, 0.0, 0.0
        for part in x.split(4096):  # in parts: a float copy of all images would be 4x the data
            part = raw(part).double()
            count += part.numel() // part.shape[1]
            total = total + part.sum(dims)
            square = square + part.square().sum(dims)
        mean = torch.as_tensor(total) / count
        std = (torch.as_tensor(square) / count - mean**2).clamp_min(0).sqrt()
        std = torch.where(std > 1e-8, std, torch.ones_like(std))
        return cls(tuple(mean.tolist()), tuple(std.tolist()))
