"""A part is what one side says to the other: a small header and tensors; here it is read without trust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from fedpress.errors import WireError

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"


@dataclass(frozen=True, eq=False)
class SecAggMessage:
    """A `header` of JSON values and `tensors` by name, to be put into a message."""

    header: Mapping[str, JSON] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def tensor(data: bytes | np.ndarray) -> Tensor:
    """Returns a fresh tensor of the same bytes or values."""
    return torch.from_numpy(
        np.frombuffer(data, np.uint8).copy() if isinstance(data, bytes) else data.copy()
    )


def read_bytes(part: SecAggMessage, name: str, shape: Sequence[int], place: str) -> np.ndarray:
    """Returns the uint8 tensor `name` of exactly `shape`.

    Raises:
        WireError: if it is missing or anything else.
    """
    return read(part, name, torch.uint8, shape, place).numpy()


def read(
    part: SecAggMessage, name: str, dtype: torch.dtype, shape: Sequence[int], place: str
) -> Tensor:
    """Returns the contiguous CPU tensor `name` of exactly `dtype` and `shape`, or raises WireError."""
    got = part.tensors.get(name)
    if not isinstance(got, Tensor):
        raise WireError(
            "this tensor is missing", place=f"{place}.{name}", cure="send what the secure sum made"
        )
    if got.dtype != dtype or tuple(got.shape) != tuple(shape) or got.layout != torch.strided:
        raise WireError(
            f"got {got.dtype} {list(got.shape)}, expected {dtype} {list(shape)}",
            place=f"{place}.{name}",
            cure="send it unchanged",
        )
    return got.detach().cpu().contiguous()


def read_number(part: SecAggMessage, name: str, place: str) -> int:
    """Returns the whole number `name` >= 0 of the header, or raises WireError."""
    got = part.header.get(name)
    if not isinstance(got, int) or isinstance(got, bool) or not 0 <= got < 1 << 62:
        raise WireError(
            "expected a whole number from 0 on", place=f"{place}.{name}", cure="send it unchanged"
        )
    return got


def read_names(part: SecAggMessage, name: str, place: str) -> list[str]:
    """Returns the list of strings `name` of the header, or raises WireError."""
    got = part.header.get(name)
    if not isinstance(got, list):
        raise WireError(
            "expected a list of names", place=f"{place}.{name}", cure="send it unchanged"
        )
    names = [item for item in got if isinstance(item, str)]
    if len(names) != len(got):
        raise WireError("expected names only", place=f"{place}.{name}", cure="send it unchanged")
    return names
