"""Suggests a fix for inputs that a model does not take: `torch.as_tensor(x).permute(0, 3, 1, 2)`.

The fix is part of an error message. The model is run on the examples in other forms: with the axes
in another order, with a channel axis, or flattened. If no form works, the message says which shape
the first layer takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

MOST_AXES = 4
"""Largest number of axes of an example that are tried in every order: 24 orders, a run for each."""

SPACE = ("length", "height, width", "depth, height, width")
"""Axes of an example after the channels, for convolutions of one, two and three dimensions."""


@torch.no_grad()
def input_cure(model: nn.Module, x: object, otherwise: str) -> str:
    """Returns the text of a fix for examples that a model does not take.

    Args:
        model: the model, in evaluation mode: in training mode a batch norm would learn from the
            trial runs.
        x: the batch [n, ...] that the model does not take.
        otherwise: the text that is returned if no fix is found.

    >>> input_cure(nn.Conv2d(3, 4, 3), torch.rand(2, 16, 16, 3), "?")
    'give torch.as_tensor(x).permute(0, 3, 1, 2), examples of shape [3, 16, 16], which it takes'
    >>> input_cure(nn.Linear(4, 2), torch.rand(2, 5), "?")
    'its first layer, Linear, takes examples of shape [4]'
    """
    if not isinstance(x, Tensor):
        return otherwise
    for call, other in _forms(x):
        try:
            out = model(other)
        except Exception:  # a user's network may raise anything
            continue
        # With mixed-up axes a network may run and return a wrong number of rows.
        if isinstance(out, Tensor) and len(out) == len(x):
            return f"give {call}, examples of shape {list(other.shape[1:])}, which it takes"
    wanted = _first_layer(model)
    if wanted is None:
        return otherwise
    return f"its first layer, {wanted[0]}, takes examples of shape {wanted[1]}"


def _forms(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields (code, batch): the batch `x` in another form, and the code that makes this form."""
    # The user's `x` may be an array of NumPy, which has no `permute`.
    own = "torch.as_tensor(x)"
    axes = range(1, x.dim())
    if len(axes) <= MOST_AXES:
        for order in permutations(axes):
            if list(order) != list(axes):
                words = ", ".join(map(str, (0, *order)))
                yield f"{own}.permute({words})", x.permute(0, *order)
    yield f"{own}.unsqueeze(1)", x.unsqueeze(1)  # images of one channel, without an axis for it
    if x.dim() > 2:
        yield f"{own}.flatten(1)", x.flatten(1)


def _first_layer(model: nn.Module) -> tuple[str, str] | None:
    """Returns the class name of the first layer with weights, and the shape of its examples.

    Returns None if this layer is neither linear nor a convolution.
    """
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
