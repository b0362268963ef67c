"""Defines sparsity patterns: which entries of a weight are kept or zeroed together.

"unstructured": each entry alone. N:M such as "2:4": 2 of every 4 consecutive inputs are kept. A
block such as "4x1": the weights of 4 outputs and 1 input, at one position of the kernel. "filter":
all weights of an output channel. "channel": all weights of an input channel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fedpress.compress.sparse.weights import Weight
from fedpress.errors import RecipeError

Kind = Literal["unstructured", "n:m", "block", "filter", "channel"]


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: which entries of a weight must be kept or zeroed together.

    Attributes:
        kind: kind of pattern.
        a: N of N:M, or the number of outputs in a block.
        b: M of N:M, or the number of inputs in a block.

    >>> Pattern.parse("2:4")
    Pattern(kind='n:m', a=2, b=4)
    """

    kind: Kind
    a: int = 1
    b: int = 1

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads "unstructured", "filter", "channel", N:M such as "2:4", or a block such as "4x1".

        Raises:
            RecipeError: if `text` is not a pattern.
        """
        for kind in ("unstructured", "filter", "channel"):
            if text == kind:
                return cls(kind)
        found = re.fullmatch(r"(\d{1,4})([:x])(\d{1,4})", text)
        if found:
            a, b = int(found[1]), int(found[3])
            # N = M would keep everything, and N = 0 nothing.
            if found[2] == ":" and 0 < a < b:
                return cls("n:m", a, b)
            if found[2] == "x" and a * b > 1:
                return cls("block", a, b)
        raise RecipeError(
            (
                f"got '{text}', expected 'unstructured', 'filter', 'channel', N:M with N below "
                "M such as '2:4', or a block of outputs x inputs such as '4x1'"
            ),
            place="pattern",
        )

    @property
    def density(self) -> float | None:
        """The density that N:M fixes, such as 0.5 for 2:4; None for patterns with any density."""
        if self.kind != "n:m":
            return None
        return self.a / self.b

    def why_not_applicable(self, weight: Weight) -> str | None:
        """Returns why `weight` cannot have this pattern; None if it can."""
        inputs = weight.value.shape[0 if weight.transposed else 1]
        # Formats of N:M (2:4 tensor cores, for instance) store N values for every M inputs, so a
        # shorter last group is not possible.
        if self.kind == "n:m" and inputs % self.b:
            return f"its {inputs} inputs are no multiple of {self.b}"
        return None

    def units(self, weight: Weight) -> Tensor:
        """Returns the number of the unit of each entry, int64 in the weight's shape.

        The entries of a unit are kept or zeroed together. Blocks at the edge of a weight are
        smaller if the block size does not divide the weight's size. N:M has no units; use `n_of_m`.
        """
        shape = weight.value.shape
        if self.kind == "unstructured":
            return torch.arange(weight.size).view(shape)
        outputs, inputs = _axes(weight)
        if self.kind == "filter":
            return outputs.expand(shape)
        if self.kind == "channel":
            return inputs.expand(shape)
        out_axis, in_axis = _out_in(weight)
        # A block covers `a` outputs and `b` inputs at a single position of the kernel.
        rows = _along(torch.arange(shape[out_axis]) // self.a, out_axis, len(shape))
        columns = _along(torch.arange(shape[in_axis]) // self.b, in_axis, len(shape))
        kernel = torch.arange(prod(shape[2:])).view(1, 1, *shape[2:])
        per_row = -(-shape[in_axis] // self.b)
        return (rows * per_row + columns) * kernel.numel() + kernel


def n_of_m(scores: Tensor, weight: Weight, n: int, m: int) -> Tensor:
    """Returns the mask that keeps the `n` highest scores of every `m` consecutive inputs.

    If scores are equal, the first entries are kept.

    Args:
        scores: scores in the shape of the weight.
        weight: the weight, which says which axis has the inputs.
        n: number of entries to keep in each group.
        m: size of a group; it must divide the number of inputs.

    Returns:
        A mask in the shape of the weight, true for kept entries.

    >>> one = Weight("w", torch.nn.Parameter(torch.zeros(1, 4)))
    >>> n_of_m(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), one, 2, 4)
    tensor([[False,  True,  True, False]])
    """
    axis = _out_in(weight)[1]
    moved = scores.movedim(axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    # Stable, so that the first of equal scores is kept.
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return kept.reshape(moved.shape).movedim(-1, axis)


def _out_in(weight: Weight) -> tuple[int, int]:
    """Returns the axes of outputs and inputs."""
    return (1, 0) if weight.transposed else (0, 1)


def _axes(weight: Weight) -> tuple[Tensor, Tensor]:
    """Returns the output channel and the input channel of each entry, in shapes that broadcast.

    With groups, axis 1 counts channels within a group; here they are counted over all groups.
    """
    first, second, *rest = weight.value.shape
    dims = 2 + len(rest)
    axis_0 = _along(torch.arange(first), 0, dims)
    axis_1 = _along(torch.arange(second), 1, dims)
    group = axis_0 // (first // weight.groups)
    grouped = group * second + axis_1
    return (grouped, axis_0) if weight.transposed else (axis_0, grouped)


def _along(numbers: Tensor, axis: int, dims: int) -> Tensor:
    """Returns a vector in a shape that is broadcast along all axes but `axis`."""
    sizes = [1] * dims
    sizes[axis] = -1
    return numbers.view(sizes)
