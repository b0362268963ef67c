"""Joins a model's tensors to one vector for each type, which an offer sends.

Floats in a message are sent as they are. Entropy coding would save 8% of a new model's bytes, and
take a second for 10 MB on each side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedpress.core.settings import SETTINGS
from fedpress.errors import WireError
from fedpress.wire.message import DTYPES, MAX_BYTES, MAX_DIMENSIONS

BOOL = "BOOL"
"""Name of the type of truth values, which a message cannot have; they are sent as U8."""
NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.bool: BOOL}
"""Type of a tensor -> its name in an entry."""
PREFIX = "model."
"""Beginning of a vector's name in the message, before the name of its type: `model.F32`."""
Size = Annotated[int, Field(ge=0, le=MAX_BYTES)]


class Entry(BaseModel):
    """Name, type and shape of one tensor. Entries are in the order of the values in the vectors.

    Attributes:
        name: name of the tensor in the model.
        dtype: a name in `DTYPES`, or `BOOL`.
        shape: shape of the tensor.
    """

    model_config = ConfigDict(**SETTINGS, strict=True)

    name: str
    dtype: str
    shape: Annotated[tuple[Size, ...], Field(max_length=MAX_DIMENSIONS)]


def join(tensors: Mapping[str, Tensor]) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """Joins tensors to one vector for each type.

    Args:
        tensors: name -> tensor on the CPU.

    Returns:
        The entries that `split` needs, and the vectors by name: `model.F32` [n], and so on.

    Raises:
        WireError: if the type of a tensor cannot be sent.

    >>> entries, vectors = join({"a": torch.ones(2, 2), "b": torch.zeros(3)})
    >>> vectors["model.F32"]
    tensor([1., 1., 1., 1., 0., 0., 0.])
    >>> split(entries, vectors)["b"]
    tensor([0., 0., 0.])
    """
    entries = []
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        dtype = NAMES.get(tensor.dtype)
        if dtype is None:
            raise WireError(
                f"dtype {tensor.dtype} cannot be sent",
                place=f"model.{name}",
                cure=f"use one of {', '.join(DTYPES)}",
            )
        entries.append(Entry(name=name, dtype=dtype, shape=tuple(tensor.shape)))
        parts.setdefault(dtype, []).append(tensor.reshape(-1))
    vectors = {}
    for dtype, flat in parts.items():
        joined = torch.cat(flat)
        vectors[PREFIX + dtype] = joined.to(torch.uint8) if dtype == BOOL else joined
    return tuple(entries), vectors


def split(entries: Sequence[Entry], vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that `join` has joined, as views of the vectors.

    Args:
        entries: the entries. They are not trusted: any server may have sent them.
        vectors: tensors of the message; others than the model's are ignored.

    Raises:
        WireError: if entries and vectors do not fit together.
    """
    tensors: dict[str, Tensor] = {}
    left = {dtype: _vector(vectors, dtype) for dtype in NAMES.values()}
    for entry in entries:
        # Cut, because a dishonest server could send a name of megabytes.
        name = repr(entry.name[:80])
        if entry.name in tensors:
            raise _wrong(f"{name} comes twice")
        if entry.dtype not in left:
            raise _wrong(f"{name} has the unknown type {entry.dtype[:80]!r}")
        size = prod(entry.shape)
        if size > len(left[entry.dtype]):
            raise _wrong(f"{name} needs more values of {entry.dtype} than came")
        # Sizes of 0 count as 1: torch multiplies the other sizes even if the tensor is empty, and
        # that product must not overflow.
        if prod(max(size, 1) for size in entry.shape) > MAX_BYTES:
            raise _wrong(f"the shape of {name} is out of range")
        tensors[entry.name] = left[entry.dtype][:size].view(entry.shape)
        left[entry.dtype] = left[entry.dtype][size:]
    for dtype, rest in left.items():
        if len(rest):
            raise _wrong(f"{len(rest)} values of {dtype} are left over")
    return tensors


def _vector(vectors: Mapping[str, Tensor], dtype: str) -> Tensor:
    """Returns the vector of one type; without values if the message has none of this type."""
    wanted = torch.uint8 if dtype == BOOL else DTYPES[dtype]
    vector = vectors.get(PREFIX + dtype, torch.empty(0, dtype=wanted))
    if vector.dtype != wanted or vector.dim() != 1:
        raise _wrong(f"{PREFIX}{dtype} is not a vector of its type")
    return vector.to(torch.bool) if dtype == BOOL else vector


def _wrong(problem: str) -> WireError:
    return WireError(problem, place="model", cure="use the same fedpress on both sides")
