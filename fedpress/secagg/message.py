"""The messages of a secure sum, and functions that read and check their fields.

A message may come from a dishonest sender, so type, shape and range of each field are checked.
"""

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
    """One message of a secure sum. It is sent inside a `fedpress.wire.message.Message`.

    Attributes:
        header: JSON values by name.
        tensors: tensors by name.
        unmade: see `fedpress.wire.message.Message`; only within one process.
    """

    header: Mapping[str, JSON] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    unmade: Mapping[str, int | Tensor] = field(default_factory=dict)


def as_tensor(data: bytes | np.ndarray) -> Tensor:
    """Returns a new tensor with a copy of `data`; bytes become uint8."""
    if isinstance(data, bytes):
        data = np.frombuffer(data, np.uint8)
    # A copy, because torch must not use memory that is read-only or changes later.
    return torch.from_numpy(data.copy())


def read_bytes(message: SecAggMessage, name: str, shape: Sequence[int], place: str) -> np.ndarray:
    """Returns the uint8 tensor `name` of exactly `shape`; see `read_tensor`.

    Raises:
        WireError: if the tensor is missing, or has another type or shape.
    """
    return read_tensor(message, name, torch.uint8, shape, place).numpy()


def read_tensor(
    message: SecAggMessage, name: str, dtype: torch.dtype, shape: Sequence[int], place: str
) -> Tensor:
    """Returns the tensor `name` of exactly `dtype` and `shape`, contiguous and on the CPU.

    See `find_tensor` for the arguments.

    Raises:
        WireError: if the tensor is missing, is sparse, or has another type or shape.
    """
    return find_tensor(message, name, dtype, shape, place).detach().cpu().contiguous()


def find_tensor(
    message: SecAggMessage, name: str, dtype: torch.dtype, shape: Sequence[int], place: str
) -> Tensor:
    """Returns the tensor `name` of exactly `dtype` and `shape`, as it is in the message.

    Args:
        message: the received message.
        name: name of the tensor.
        dtype: expected type.
        shape: expected shape.
        place: name of the message in errors, such as "unmask".

    Raises:
        WireError: if the tensor is missing, is sparse, or has another type or shape.
    """
    got = message.tensors.get(name)
    if not isinstance(got, Tensor):
        raise WireError(
            "this tensor is missing", place=f"{place}.{name}", cure="send the message unchanged"
        )
    # A sparse tensor can have the right type and shape, but numpy cannot read it.
    if got.dtype != dtype or tuple(got.shape) != tuple(shape) or got.layout != torch.strided:
        raise WireError(
            f"got {got.dtype} {list(got.shape)}, expected {dtype} {list(shape)}",
            place=f"{place}.{name}",
            cure="send it unchanged",
        )
    return got


def read_number(message: SecAggMessage, name: str, place: str) -> int:
    """Returns the header field `name`, a whole number from 0 to 2^62 - 1.

    Raises:
        WireError: if the field is missing or anything else.
    """
    got = message.header.get(name)
    # A bool is an int in Python, but not a number here.
    if not isinstance(got, int) or isinstance(got, bool) or not 0 <= got < 1 << 62:
        raise WireError(
            "expected a whole number >= 0", place=f"{place}.{name}", cure="send it unchanged"
        )
    return got


def read_names(message: SecAggMessage, name: str, place: str) -> list[str]:
    """Returns the header field `name`, a list of strings.

    Raises:
        WireError: if the field is missing or anything else.
    """
    got = message.header.get(name)
    if not isinstance(got, list):
        raise WireError(
            "expected a list of names", place=f"{place}.{name}", cure="send it unchanged"
        )
    names = []
    for item in got:
        if not isinstance(item, str):
            raise WireError(
                "expected names only", place=f"{place}.{name}", cure="send it unchanged"
            )
        names.append(item)
    return names
