"""Holds examples in memory (`Arrays`), standardises them (`Preprocess`) and resizes images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from fedpress.core.inputs import Inputs, NamedInputs, as_inputs
from fedpress.errors import DataError

MISSING = -(2.0**120)
"""Value of a missing cell until a statistic fills it. It is exact in float32, and no cell of a table
has it."""


@dataclass(frozen=True)
class Arrays:
    """Examples `x` and targets `y` [n, ...] in memory.

    Examples are uint8 images [n, C, H, W], float32 features or int64 ids [n, ...]. If the network
    takes several inputs, `x` is a dictionary of such tensors, by the names of forward's arguments
    (`NamedInputs`).

    Raises:
        DataError: if the numbers of examples and targets differ.
    """

    x: Inputs
    y: Tensor

    def __post_init__(self) -> None:
        # Plain assignment fails in a frozen dataclass.
        object.__setattr__(self, "x", as_inputs(self.x))
        if len(self.x) != len(self.y):
            raise DataError(
                f"{len(self.x)} examples but {len(self.y)} labels",
                place="y",
                cure="give one label for each example",
            )

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Arrays:
        """Returns the examples at the int64 positions `index` [k]."""
        return Arrays(self.x[index], self.y[index])

    def batches(self, size: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yields examples and labels in batches of nearly equal size, at most `size`."""
        # Not `split`: its last batch could be a single example, on which batch norm fails.
        parts = math.ceil(len(self) / size)
        if not parts:
            return iter(())
        return zip(self.x.tensor_split(parts), self.y.tensor_split(parts), strict=True)


@dataclass(frozen=True)
class Preprocess:
    """Standardises raw examples per channel (dimension 1); uint8 is scaled to 0..1 first.

    Without `mean` and `std`, only uint8 is scaled. Several inputs (`NamedInputs`) can have no
    `mean` and `std`.

    >>> Preprocess((0.5,), (0.5,))(torch.tensor([[[[255]]]], dtype=torch.uint8)).item()
    1.0
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(0 < s < math.inf for s in self.std):
            raise DataError(
                f"got {self.std} beside mean {self.mean}",
                place="std",
                cure="give as many values as in mean, every one above 0",
            )

    @overload
    def __call__(self, x: Tensor) -> Tensor: ...

    @overload
    def __call__(self, x: Inputs) -> Inputs: ...

    def __call__(self, x: Inputs) -> Inputs:
        """Returns standardised float32 of the same shape as `x` [n, C, ...].

        Without means, int64 (token ids) is returned unchanged. Among several inputs, booleans are
        returned unchanged too.

        Raises:
            DataError: if the number of means is neither C nor 1, or `x` has several inputs and
                there are means.
        """
        if isinstance(x, NamedInputs):
            if self.mean:
                raise no_statistics()
            return x.map(lambda t: t if t.dtype == torch.bool else self(t))
        # Such integers are token ids: indices of an embedding must not be scaled.
        if x.dtype == torch.int64 and not self.mean:
            return x
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        x = x.to(torch.float32)
        if not self.mean:
            return x / scale
        if len(self.mean) not in (1, x.shape[1]):
            raise DataError(
                f"the examples have {x.shape[1]} channels, but {len(self.mean)} means are given",
                place="mean",
                cure="give one for each channel in mean and std",
            )
        shape = (1, -1, *[1] * (x.dim() - 2))
        # Scaling the few statistics instead of `x` saves one pass over the examples.
        mean = torch.tensor(self.mean, device=x.device).view(shape) * scale
        std = torch.tensor(self.std, device=x.device).view(shape) * scale
        return (x - mean) / std

    @classmethod
    def fit(cls, x: Inputs) -> Preprocess:
        """Computes mean and std per channel of examples `x` [n, C, ...].

        The examples must be public, because their statistics get no noise. A constant channel gets
        std 1. For several inputs (`NamedInputs`), there are no statistics.

        Raises:
            DataError: if there are no examples, or a value is NaN or infinite.
        """
        if isinstance(x, NamedInputs):
            return cls()
        if not x.numel():
            raise DataError(
                "there are no public examples to take mean and std from",
                place="x",
                cure="give mean and std",
            )
        if x.dtype == torch.uint8:
            mean, std = _byte_statistics(x)
        else:
            mean, std = _float_statistics(x)
        if not (mean.isfinite() & std.isfinite()).all():
            raise DataError(
                "the public examples hold NaN or infinite values",
                place="x",
                cure="remove them from the data",
            )
        return cls(tuple(mean.tolist()), tuple(std.tolist()))


def no_statistics() -> DataError:
    """Returns the error for a `mean` that is given with several inputs."""
    return DataError(
        "mean and std are for examples of one tensor, and these have several inputs",
        place="mean",
        cure="leave mean and std out, and scale the inputs where they are made",
    )


def resized(x: Tensor, side: int) -> Tensor:
    """Resizes images `x` [n, C, H, W] (uint8 or float) to `side` x `side` pixels, antialiased."""
    if x.shape[-2:] == (side, side) or not len(x):
        return x
    # In parts, because each is converted to float32, four times as large as bytes.
    return torch.cat([_interpolated(part, side) for part in x.split(4096)])


def _interpolated(x: Tensor, side: int) -> Tensor:
    out = F.interpolate(
        x.float(), (side, side), mode="bilinear", antialias=True, align_corners=False
    )
    if not x.is_floating_point():
        # Conversion to uint8 would drop the fraction, and wrap around outside of 0 to 255.
        out = out.round().clamp(0, 255)
    return out.to(x.dtype)


def _byte_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std [C] of uint8 examples, exactly, from the counts of the 256 values."""
    level = Preprocess()(torch.arange(256, dtype=torch.uint8)).double()
    counts = [torch.bincount(channel.reshape(-1), minlength=256) for channel in x.unbind(1)]
    count = torch.stack(counts).cpu()
    # x.numel() / x.shape[1] is the number of values of one channel.
    share = count.double() * x.shape[1] / x.numel()
    mean = share @ level
    std = (share * (level - mean.view(-1, 1)).square()).sum(1).sqrt()
    is_constant = (count > 0).sum(1) <= 1
    return mean, torch.where(is_constant, 1.0, std)


def _float_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and std [C] in float64, computed part by part to need little memory.

    The deviations need a second pass, because the formula E[x^2] - E[x]^2 loses digits.
    """
    dims = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    weight = x.shape[1] / x.numel()
    mean = torch.stack([part.double().sum(dims) for part in x.split(4096)]).sum(0) * weight
    parts = [(part.double() - mean.view(shape)).square().sum(dims) for part in x.split(4096)]
    std = (torch.stack(parts).sum(0) * weight).sqrt()
    # A std below the smallest normal float32 would be 0 in float32: the channel counts as constant.
    varies = (x.amax(dims) > x.amin(dims)) & (std > torch.finfo(torch.float32).tiny)
    return mean, torch.where(varies, std, 1.0)
