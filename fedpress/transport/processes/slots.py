"""Slots: equal parts of memory that all processes share, for the tensors of one message each."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedpress.errors import Argument, RunError

ALIGN = 64
"""Tensors begin at multiples of 64 bytes, the length of a processor's cache line."""


@dataclass(frozen=True)
class Piece:
    """A tensor on its way to another process.

    Attributes:
        name: name of the tensor.
        dtype: its type.
        shape: its shape.
        at: offset in the slot, in bytes; None: the bytes are in `data`.
        data: the bytes, if the slot had no room for them.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int | None
    data: bytes = b""


class Slots:
    """Shared memory in slots of equal size.

    The pages of a slot take memory only once they are written, so large slots cost nothing.

    >>> slots = Slots(2, 1000)
    >>> slot = slots.take()
    >>> pieces = slots.write(slot, {"x": torch.arange(3)})
    >>> slots.read(slot, *pieces), slots.num_free
    (({'x': tensor([0, 1, 2])},), 1)
    """

    def __init__(self, count: int, size: int) -> None:
        """Reserves the memory. Processes that are forked later share it.

        Args:
            count: number of slots.
            size: smallest size of a slot, in bytes.

        Raises:
            RunError: if the system has no such amount of shared memory.
        """
        self.size = _aligned(max(size, 1))
        try:
            self._memory = mmap.mmap(-1, max(count, 1) * self.size)
        except (OSError, ValueError, OverflowError) as problem:
            raise RunError(
                f"the system gives no {count * self.size} bytes of shared memory ({problem})",
                place="engine",
                cure=(
                    "take fewer ",
                    Argument("engine.workers"),
                    ", or ",
                    Argument("engine", "local"),
                ),
            ) from problem
        self._free = list(reversed(range(count)))

    @property
    def num_free(self) -> int:
        """Number of slots that are not taken."""
        return len(self._free)

    def take(self) -> int | None:
        """Returns a free slot, which is then taken; None if there is none."""
        return self._free.pop() if self._free else None

    def give(self, slot: int) -> None:
        """Makes a taken slot free again."""
        self._free.append(slot)

    def write(
        self, slot: int | None, *groups: Mapping[str, Tensor]
    ) -> tuple[tuple[Piece, ...], ...]:
        """Copies tensors into a slot.

        Args:
            slot: the slot; None: there is none, and the pieces hold the bytes themselves.
            groups: tensors by name. A tensor without room in the slot goes into its piece.

        Returns:
            The pieces of each group.
        """
        end = 0
        found = []
        for group in groups:
            pieces = []
            for name, tensor in group.items():
                values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
                begin, shape = _aligned(end), tuple(tensor.shape)
                if slot is None or begin + len(values) > self.size:
                    pieces.append(Piece(name, tensor.dtype, shape, None, values.tobytes()))
                    continue
                end = begin + len(values)
                self._bytes(slot)[begin:end] = values
                pieces.append(Piece(name, tensor.dtype, shape, begin))
            found.append(tuple(pieces))
        return tuple(found)

    def read(
        self, slot: int | None, *groups: Sequence[Piece], give: bool = False
    ) -> tuple[dict[str, Tensor], ...]:
        """Returns the tensors of each group; those in the slot are views of it.

        Args:
            slot: the slot that was given to `write`.
            groups: the result of `write`.
            give: makes the slot free as soon as no view is used any more, however long that takes.
        """
        memory = torch.empty(0, dtype=torch.uint8)
        if slot is not None:
            values = self._bytes(slot)
            if give:
                # A tensor that was made from an array keeps the array, and so do all its views.
                weakref.finalize(values, self.give, slot).atexit = False
            memory = torch.from_numpy(values)
        found = []
        for group in groups:
            tensors = {}
            for piece in group:
                if piece.at is None:
                    raw = torch.from_numpy(np.frombuffer(bytearray(piece.data), np.uint8))
                else:
                    raw = memory[piece.at : piece.at + prod(piece.shape) * piece.dtype.itemsize]
                tensors[piece.name] = raw.view(piece.dtype).reshape(piece.shape)
            found.append(tensors)
        return tuple(found)

    def _bytes(self, slot: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8, self.size, slot * self.size)


def _aligned(size: int) -> int:
    """Returns the smallest multiple of `ALIGN` that is not below `size`.

    >>> _aligned(1), _aligned(64)
    (64, 64)
    """
    return -(-size // ALIGN) * ALIGN
