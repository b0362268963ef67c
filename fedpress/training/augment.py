"""Augments whole batches of images by tensor operations: random crop, flip and cutout."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from fedpress.core.inputs import Inputs, is_image
from fedpress.core.random_source import Source, as_random_source
from fedpress.core.settings import SETTINGS


class Augment(BaseModel):
    """Settings of random changes of training images.

    Sizes are shares of the image's side; if an image is not square, of its width.

    With `flip = "random"` each image is mirrored with probability 1/2. With "alternate" each image
    is mirrored in every other epoch, so two consecutive epochs show both versions (the derandomised
    flip of airbench, Jordan 2024, arXiv:2404.00498). Federated training has no such epochs:
    "alternate" then does the same as "random".
    """

    model_config = SETTINGS

    crop: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="largest shift, with reflected borders, as a share of the side",
    )
    flip: str = Field(
        default="none",
        pattern="^(none|random|alternate)$",
        description="mirrors images: none, random (each with probability 1/2), alternate (each "
        "in every other epoch)",
    )
    cutout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="side of the square set to grey, as a share of the side",
    )

    @property
    def active(self) -> bool:
        """Whether images are changed at all."""
        return self.crop > 0 or self.flip != "none" or self.cutout > 0


def augment(x: Inputs, how: Augment, generator: Source, *, flipped: Tensor | None = None) -> Inputs:
    """Returns a changed copy of the images `x` [n, C, H, W]; other inputs are returned unchanged.

    Args:
        x: images of bytes or floats.
        how: the settings.
        generator: the random source, on the CPU.
        flipped: which images to mirror in this epoch, bool [n]; used only for flip "alternate".
            None: each image is mirrored with probability 1/2.
    """
    if not is_image(x) or not len(x):
        return x
    chance = as_random_source(generator)
    if how.crop:
        x = random_shift(x, max(1, round(how.crop * x.shape[-1])), chance)
    if how.flip != "none":
        # Without an epoch, as in federated training, "alternate" is the same as "random".
        if how.flip == "random" or flipped is None:
            flipped = chance.uniform(len(x)) < 0.5
        x = torch.where(flipped.to(x.device).view(-1, 1, 1, 1), x.flip(-1), x)
    if how.cutout:
        x = cutout(x, max(1, round(how.cutout * x.shape[-1])), chance)
    return x


def random_shift(x: Tensor, most: int, generator: Source) -> Tensor:
    """Shifts each image of `x` [n, C, H, W] by up to `most` pixels, with reflected borders."""
    n, _, height, width = x.shape
    # A shift must be smaller than the image, because only its own pixels can be reflected.
    most = min(most, height - 1, width - 1)
    dy, dx = (as_random_source(generator).integers(2 * most + 1, 2, n, 1) - most).to(x.device)
    rows = _mirrored(dy + torch.arange(height, device=x.device), height).view(n, 1, height, 1)
    columns = _mirrored(dx + torch.arange(width, device=x.device), width).view(n, 1, 1, width)
    # Each image has its own shift, so all pixels are gathered by one indexing operation.
    at = torch.arange(n, device=x.device).view(n, 1, 1, 1)
    channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
    return x[at, channel, rows, columns]


def _mirrored(index: Tensor, size: int) -> Tensor:
    """Reflects positions outside of 0 to `size - 1` back inside, without repeating the border."""
    return size - 1 - (size - 1 - index.abs()).abs()


def cutout(x: Tensor, side: int, generator: Source) -> Tensor:
    """Sets a square with sides of `side` pixels in each image to grey (DeVries & Taylor 2017).

    Grey is 128 for bytes, and 0 for floats, which are standardised.
    """
    n, _, height, width = x.shape
    chance = as_random_source(generator)
    # Every pixel is equally likely to be the centre, so the square may extend past the border.
    top = chance.integers(height, n, 1, 1, 1).to(x.device) - side // 2
    left = chance.integers(width, n, 1, 1, 1).to(x.device) - side // 2
    rows = torch.arange(height, device=x.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=x.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    grey = 0 if x.is_floating_point() else 128
    return x.masked_fill(inside, grey)
