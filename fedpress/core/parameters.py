"""Converts a model's trainable parameters to one flat float32 vector, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fedpress.errors import WireError

TINY = 1 << 16
"""Number of values up to which a copy costs less than one call of torch for each parameter."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable parameters, in the order of the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of values in the flat vector."""
        return sum(prod(shape) for shape in self.shapes)

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Returns the layout of all parameters of `model` with `requires_grad`."""
        # Frozen parameters are the same on server and clients, so they are not sent.
        named = [(n, tuple(p.shape)) for n, p in model.named_parameters() if p.requires_grad]
        return cls(tuple(n for n, _ in named), tuple(s for _, s in named))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters with `requires_grad`, in the order of `Layout`."""
    return [p for p in model.parameters() if p.requires_grad]


def flatten(model: nn.Module) -> Tensor:
    """Copies the trainable parameters of `model` into one float32 vector [d] on the CPU."""
    parts = [p.detach().reshape(-1).to("cpu", torch.float32) for p in trainable(model)]
    # A model may train nothing, and `cat` fails on an empty list.
    if not parts:
        return torch.zeros(0)
    return torch.cat(parts)


def change(model: nn.Module, start: Tensor) -> Tensor:
    """Returns how the trainable parameters differ from `start` [d], as float32 [d] on the CPU.

    It is `flatten(model) - start`, without a copy of the parameters if they are many.
    """
    # For a tiny model one subtraction more costs more than a copy.
    if len(start) <= TINY:
        return flatten(model) - start
    found = torch.empty_like(start)
    at = 0
    with torch.no_grad():
        for p in trainable(model):
            part = slice(at, at + p.numel())
            values = p.reshape(-1).to("cpu", torch.float32)
            torch.sub(values, start[part], out=found[part])
            at += p.numel()
    return found


def assign_(model: nn.Module, vector: Tensor) -> None:
    """Writes the flat `vector` [d] into the trainable parameters of `model`.

    Raises:
        WireError: if the vector does not have as many values as the trainable parameters together.
    """
    params = trainable(model)
    size = sum(p.numel() for p in params)
    if vector.shape != (size,):
        raise WireError(
            f"the vector has shape {tuple(vector.shape)} but the model trains {size} values",
            place="vector",
            cure=f"send a vector of shape [{size}]",
        )
    # Without `no_grad`, torch refuses to write into a parameter in place.
    with torch.no_grad():
        parts = vector.split([p.numel() for p in params])
        for p, part in zip(params, parts, strict=True):
            p.copy_(part.view(p.shape))


def tensors_under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names begin with `prefix`, with the prefix removed.

    >>> tensors_under({"model/bias": torch.zeros(1), "mask/bias": torch.ones(1)}, "mask/")
    {'bias': tensor([1.])}
    """
    found = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = value
    return found
