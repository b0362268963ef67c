"""What to do with examples that a model does not take: other axes, or what its first layer takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

MOST_AXES = 4
"""Of an example whose axes are tried in every order: 24 orders, a trial run each."""

SPACE = ("length", "height, width", "depth, height, width")


@torch.no_grad()
def input_cure(model: nn.Module, x: object, otherwise: str) -> str:
    """Returns a cure for examples that a model does not take.

    Args:
        model: in evaluation mode, as a batch norm would learn from a trial run.
        x: a batch [n, ...] as the model was given it.
        otherwise: the cure where nothing is found.

    >>> input_cure(nn.Conv2d(3, 4, 3), torch.rand(2, 16, 16, 3), "?")
    'give x.permute(0, 3, 1, 2), examples of shape [3, 16, 16], which it takes'
    >>> input_cure(nn.Linear(4, 2), torch.rand(2, 5), "?")
    'its first layer, Linear, takes examples of shape [4]'
    """
    if not isinstance(x, Tensor):
        return otherwise
    for call, other in _forms(x):
        try:
            out = model(other)
        except Exception:  # whatever somebody's own network raises
            continue
        if isinstance(out, Tensor) and len(out) == len(x):
            return f"give {call}, examples of shape {list(other.shape[1:])}, which it takes"
    wanted = _first_layer(model)
    if wanted is None:
        return otherwise
    return f"its first layer, {wanted[0]}, takes examples of shape {wanted[1]}"


def _forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields other forms of the same batch, each with the call that makes it of `x`."""
    axes = range(1, x.dim())
    if len(axes) <= MOST_AXES:
        for order in permutations(axes):
            if list(order) != list(axes):
                yield f"x.permute({', '.join(map(str, (0, *order)))})", x.permute(0, *order)
    yield "x.unsqueeze(1)", x.unsqueeze(1)  # images of one channel, without an axis for it
    if x.dim() > 2:
        yield "x.flatten(1)", x.flatten(1)


def _first_layer(model: nn.Module) -> tuple[str, str] | None:
    """Returns the kind of the first layer with weights and the shape that it takes, if known."""
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, nn.Linear):
            return name, f"[{module.in_features}]"
        if isinstance(module, nn.modules.conv._ConvNd):
            sides = len(module.kernel_size)
            return name, f"[{module.in_channels}, {SPACE[sides - 1]}]"
        if any(True for _ in module.parameters(recurse=False)):
            return None
    return None
