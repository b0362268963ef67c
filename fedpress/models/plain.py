"""Networks without shortcuts: the CNN of the pfl-research benchmark, and an MLP."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class CNN(nn.Module):
    """Two convolutions and two linear layers, as in pfl-research.

    It has 1,626,442 parameters for 3x32x32 images and 10 classes.

    Args:
        num_classes: number of logits.
        in_channels: channels of an image.
        image_size: height and width of an image.
        dropout: probability after the pooling, and after the first linear layer.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        dropout: tuple[float, float] = (0, 0),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        # Each 3x3 convolution without padding makes the image 2 pixels smaller; pooling halves it.
        self.hidden = nn.Linear(64 * ((image_size - 4) // 2) ** 2, 128)
        self.head = nn.Linear(128, num_classes)
        self.dropout = dropout
        # The same initialisation as in pfl-research, so that results can be compared.
        for layer in (self.conv1, self.conv2, self.hidden, self.head):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, C, H, W] to logits [n, num_classes]."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.dropout(x, self.dropout[0], self.training)
        x = F.dropout(F.relu(self.hidden(x.flatten(1))), self.dropout[1], self.training)
        logits: Tensor = self.head(x)
        return logits


class MLP(nn.Module):
    """Linear layers with ReLU between them; the input is the flattened example.

    Args:
        in_features: number of values of an example.
        hidden: width of each hidden layer.
        num_classes: number of logits.
    """

    def __init__(
        self, *, in_features: int, hidden: tuple[int, ...] = (128, 64), num_classes: int = 10
    ) -> None:
        super().__init__()
        sizes = (in_features, *hidden, num_classes)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        """Maps examples [n, ...] to logits [n, num_classes]."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits
