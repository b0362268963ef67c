"""Residual networks for small images (He et al. 2016): a 3x3 stem and stages of basic blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fedpress.models.norms import Norm, conv, norm_layer


class BasicBlock(nn.Module):
    """Two 3x3 convolutions from `i` to `o` channels, with a shortcut around them.

    If the shape changes, the shortcut has a 1x1 convolution.
    """

    def __init__(self, i: int, o: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = conv(i, o, 3, stride=stride, norm=norm)
        self.norm1 = norm_layer(o, norm)
        self.conv2 = conv(o, o, 3, norm=norm)
        self.norm2 = norm_layer(o, norm)
        # The outputs of convolutions and shortcut are added, so they must have equal shapes.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(
                conv(i, o, 1, stride=stride, norm=norm), norm_layer(o, norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, i, H, W] to [n, o, H / stride, W / stride]."""
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, stages of basic blocks, mean pooling and a linear head.

    The first stage keeps height and width; every other stage halves them.

    Args:
        widths: number of channels of each stage.
        blocks: number of basic blocks in each stage.
        num_classes: number of logits.
        in_channels: channels of an image.
        norm: kind of the normalisation layers.
    """

    def __init__(
        self,
        *,
        widths: tuple[int, ...],
        blocks: int,
        num_classes: int,
        in_channels: int = 3,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        # A 3x3 stem without stride. The 7x7 stem for ImageNet would shrink small images too early.
        self.stem = conv(in_channels, widths[0], 3, norm=norm)
        self.norm = norm_layer(widths[0], norm)
        stages = []
        channels = widths[0]
        for at, width in enumerate(widths):
            steps = []
            for block in range(blocks):
                # The first stage keeps the full resolution, because small images have few pixels.
                stride = 2 if block == 0 and at > 0 else 1
                steps.append(BasicBlock(channels, width, stride=stride, norm=norm))
                channels = width
            stages.append(nn.Sequential(*steps))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, C, H, W] to logits [n, num_classes]."""
        x = self.stages(F.relu(self.norm(self.stem(x))))
        # The mean over pixels lets the network take images of any size.
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def resnet18(*, num_classes: int = 10, in_channels: int = 3, norm: Norm = "batch") -> ResNet:
    """Makes a ResNet-18 for 32x32 images: 11,173,962 parameters with 10 classes and batch norm."""
    return ResNet(
        widths=(64, 128, 256, 512),
        blocks=2,
        num_classes=num_classes,
        in_channels=in_channels,
        norm=norm,
    )


def resnet_small(
    *, num_classes: int = 10, in_channels: int = 3, width: int = 16, norm: Norm = "batch"
) -> ResNet:
    """Makes a small ResNet: three stages of one block, with 1, 2 and 4 times `width` channels."""
    widths = (width, 2 * width, 4 * width)
    return ResNet(
        widths=widths, blocks=1, num_classes=num_classes, in_channels=in_channels, norm=norm
    )
