"""A model's output is one tensor, or several in tuples, lists and dictionaries.

All tasks of fedpress read one tensor. A task of the user may read several (`Task.several_outputs`):
its `loss` and `metrics` get what the model's forward returns. Code between the two, which casts,
moves, selects or joins outputs, does so by the functions here, so it need not ask which it is.
Signatures say `Tensor` where nearly all outputs are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

Outputs = TypeVar("Outputs")
"""The outputs of a batch: a tensor [n, ...], or tuples, lists and dictionaries of such tensors."""


def map_outputs(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    """Returns outputs of the same structure, with the result of `change` for each tensor.

    >>> map_outputs({"boxes": torch.ones(2), "scores": (torch.zeros(1),)}, lambda t: t + 1)
    {'boxes': tensor([2., 2.]), 'scores': (tensor([1.]),)}
    """
    # The usual case, without the walk through a structure.
    if isinstance(outputs, Tensor):
        return change(outputs)  # type: ignore[return-value]
    return cast(Outputs, tree_map_only(Tensor, change, outputs))


def as_float32(outputs: Outputs) -> Outputs:
    """Returns outputs in float32; among several, integers and booleans stay as they are."""
    if isinstance(outputs, Tensor):
        return outputs.float()  # type: ignore[return-value]
    return map_outputs(outputs, lambda t: t.float() if t.is_floating_point() else t)


def rows_of_outputs(outputs: Outputs, rows: slice | Tensor) -> Outputs:
    """Returns the outputs of some examples: a slice, or a bool mask [n].

    >>> rows_of_outputs((torch.arange(3), torch.eye(3)), slice(1, 2))
    (tensor([1]), tensor([[0., 1., 0.]]))
    """
    return map_outputs(outputs, lambda t: t[rows])


def output_tensors(outputs: object) -> list[Tensor]:
    """Returns all tensors of the outputs, in the order in which they stand there."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def joined_outputs(parts: Sequence[Outputs]) -> Outputs:
    """Concatenates the outputs of batches, which have the same structure.

    >>> joined_outputs([(torch.zeros(1), None), (torch.ones(2), None)])
    (tensor([0., 1., 1.]), None)
    """
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)  # type: ignore[arg-type, return-value]
    columns = zip(*(tree_leaves(part) for part in parts), strict=True)
    leaves, form = tree_flatten(parts[0])
    found = []
    for first, column in zip(leaves, columns, strict=True):
        found.append(torch.cat(column) if isinstance(first, Tensor) else first)
    return cast(Outputs, tree_unflatten(found, form))


def spreads(batches: Sequence[object]) -> list[float]:
    """Returns the standard deviation of each tensor of the outputs over the examples.

    It is the root of the mean variance of a tensor's values, each over all examples. Of a tensor
    that is the same for all examples it is 1, so that it can be divided by; of integers, too.

    Args:
        batches: outputs of each batch, of the same structure.

    >>> spreads([torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 7.0], [2.0, 6.0]])])
    [0.816496580927726]
    """
    found = []
    for parts in zip(*map(output_tensors, batches), strict=True):
        if not parts[0].is_floating_point():
            found.append(1.0)
            continue
        count = sum(map(len, parts))
        sums = torch.stack([part.double().sum(0) for part in parts])
        mean = sums.sum(0) / count
        squares = sum(float((part - mean).square().sum()) for part in parts)
        variance = squares / (count * mean.numel())
        # Below this, the differences are only rounding errors of float32.
        rounding = 1e-12 * float(mean.square().mean())
        found.append(math.sqrt(variance) if variance > rounding else 1.0)
    return found


def outputs_text(outputs: object) -> str:
    """Returns the shapes for one example as text for errors.

    >>> outputs_text({"boxes": torch.zeros(2, 4), "scores": torch.zeros(2, 3)})
    '{boxes [4], scores [3]}'
    >>> outputs_text((torch.zeros(2, 4), None))
    '([4], NoneType)'
    """
    if isinstance(outputs, Tensor):
        return str(list(outputs.shape[1:]))
    if isinstance(outputs, dict):
        parts = [f"{name} {outputs_text(inner)}" for name, inner in outputs.items()]
        return "{" + ", ".join(parts) + "}"
    if isinstance(outputs, tuple | list):
        return "(" + ", ".join(outputs_text(inner) for inner in outputs) + ")"
    return type(outputs).__name__


def is_plain(outputs: object) -> bool:
    """Whether outputs are tensors in tuples, lists and dictionaries, and nothing else.

    Named tuples and classes of libraries are not plain: an exported file gives them back as
    dictionaries, so a loss that reads their attributes would fail on the file.
    """
    if isinstance(outputs, Tensor):
        return True
    if type(outputs) is dict:
        return bool(outputs) and all(map(is_plain, outputs.values()))
    if type(outputs) in (tuple, list):
        return bool(outputs) and all(map(is_plain, outputs))  # type: ignore[call-overload]
    return False
