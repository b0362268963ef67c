"""Runs a model on torch's meta device: shapes and calls, without values (dry runs).

A dry run of ResNet-50 on two images of 224 x 224 takes a quarter of a real run's time. It tells
whether the shapes fit, and which torch functions the code calls. It does not tell whether values
fit (an index may be out of range), so a real run has to follow, on inputs as small as allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedpress.nn.resize import copied

SMALL_IMAGE = 64
"""Images are cut down to at least this height and width, in pixels."""
LEAST_GAIN = 4
"""Images with fewer than 4 times as many pixels as a small one are left as they are."""


def meta_copy(model: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode whose parameters and buffers have shapes but no values.

    Other tensors, such as plain attributes, keep their values and their device.
    """
    shapes: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        shapes[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        shapes[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copied(model, shapes).eval()


@torch.no_grad()
def dry_calls(make: Callable[[], nn.Module], batch: Sequence[Tensor]) -> list[Any] | None:
    """Returns the torch functions that forward calls, in order, or None if it does not run.

    Some code runs on a real device only: it reads values (`x.max().item()`), or mixes `batch` with
    tensors that it creates on the CPU.

    Args:
        make: makes the model, from a `meta_copy`.
        batch: the inputs; only their shapes and types are read.
    """
    called = _DryFunctions()
    try:
        model = make()
        inputs = [torch.empty_like(x, device="meta") for x in batch]
        with called:
            model(*inputs)
    except Exception:  # the user's code may raise anything
        return None
    return called.functions


class CalledFunctions(TorchFunctionMode):
    """Records which torch functions are called within the block.

    Attributes:
        functions: the functions, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` and records it."""
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


class _DryFunctions(CalledFunctions):
    """Records the functions of a dry run; batch norms only check their sizes.

    On the meta device torch computes a batch norm by a dozen operations in Python, which took two
    thirds of ResNet-50's dry run.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` and records it."""
        options = kwargs or {}
        if func is F.batch_norm and _is_plain_batch_norm(*args, **options):
            self.functions.append(func)
            return torch.empty_like(args[0])
        return super().__torch_function__(func, types, args, options)


def _is_plain_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> bool:
    """Returns whether `F.batch_norm` with these arguments gives a tensor like `x`.

    That is so in evaluation mode, if all tensors have the type of `x` and one value per channel.
    """
    if training or x.device.type != "meta" or x.dim() < 2:
        return False
    if running_mean is None or running_var is None:
        return False
    for values in (running_mean, running_var, weight, bias):
        if values is None:
            continue
        if values.dtype != x.dtype or values.shape != x.shape[1:2] or not values.is_meta:
            return False
    return True


def smaller_images(batch: Sequence[Tensor]) -> list[Tensor] | None:
    """Returns the upper left corners of the images in `batch`, or None if they are small already.

    All tensors of at least 4 axes are images or videos; their last two axes are height and width.
    A corner has a quarter of the largest height and width, rounded up to a multiple of
    `SMALL_IMAGE`, which suits networks that halve their images up to 6 times.

    >>> [tuple(x.shape) for x in smaller_images([torch.zeros(2, 3, 224, 224), torch.zeros(2, 5)])]
    [(2, 3, 64, 64), (2, 5)]
    """
    images = [x for x in batch if x.dim() >= 4]
    sizes = {tuple(x.shape[-2:]) for x in images}
    # Images of several sizes, such as a photo and a coarse mask, must keep their ratio.
    if len(sizes) != 1:
        return None
    ((height, width),) = sizes
    side = SMALL_IMAGE * -(-max(height, width) // (4 * SMALL_IMAGE))
    if height * width < LEAST_GAIN * min(side, height) * min(side, width):
        return None
    smaller = []
    for x in batch:
        smaller.append(x[..., :side, :side].contiguous() if x.dim() >= 4 else x)
    return smaller
