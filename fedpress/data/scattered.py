"""Writes rows to a file in another order than they come in, without seeking for each row.

A client's rows are drawn in a random order, and may lie anywhere in a table. The file is divided into
blocks. Each row is appended to its block, and a block is put in order when all its rows are there.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes of a block; twice as many are in memory while it is put in order.
BLOCK = 1 << 26


class ScatteredRows:
    """The rows of a file, float32 [n, d]."""

    def __init__(self, file: Any, count: int, width: int) -> None:
        """Makes the rows of a file.

        Args:
            file: an open file without a buffer.
            count: number of rows n.
            width: numbers of a row d.
        """
        self.file = file
        self.bytes_of_row = 4 * width
        self.width = width
        self.rows_of_block = max(BLOCK // max(self.bytes_of_row, 1), 1)
        # The place that the row in each place of the file shall have.
        self.targets = torch.empty(count, dtype=torch.int64)
        self.written = [0] * -(-count // self.rows_of_block)

    def write_(self, x: Tensor, places: Tensor) -> None:
        """Writes rows; each place is written once.

        Rows are not written through a mapping of the file: where memory is short, the system would
        have to clean each of its pages first.

        Args:
            x: float32 [m, d].
            places: int64 [m]: where each row belongs; a row with -1 is not written.
        """
        order = places.argsort(stable=True)[int((places < 0).sum()) :]
        x, places = x[order], places[order]
        blocks, counts = (places // self.rows_of_block).unique_consecutive(return_counts=True)
        parts = zip(x.split(counts.tolist()), places.split(counts.tolist()), strict=True)
        for block, (part, targets) in zip(blocks.tolist(), parts, strict=True):
            begin = block * self.rows_of_block
            end = min(begin + self.rows_of_block, len(self.targets))
            at = begin + self.written[block]
            self._write(part, at)
            self.targets[at : at + len(part)] = targets
            self.written[block] += len(part)
            if at + len(part) == end:
                self._sort_(begin, end)

    def _sort_(self, begin: int, end: int) -> None:
        """Puts the rows of a full block in order."""
        order = self.targets[begin:end].argsort()
        if bool((order.diff() == 1).all()):
            return
        x = torch.empty((end - begin, self.width))
        content, place = _bytes(x), begin * self.bytes_of_row
        while content:
            read = os.preadv(self.file.fileno(), [content], place)
            # Otherwise the loop would wait for ever for the rest of a file that somebody cut.
            if not read:
                raise OSError("the file of converted rows was cut short")
            content, place = content[read:], place + read
        self._write(x[order], begin)

    def _write(self, x: Tensor, row: int) -> None:
        content, place = _bytes(x), row * self.bytes_of_row
        # A disk that is nearly full takes a part, and the rest is an error.
        while content:
            written = os.pwrite(self.file.fileno(), content, place)
            content, place = content[written:], place + written


def _bytes(x: Tensor) -> memoryview:
    return x.numpy().reshape(-1).view(np.uint8).data
