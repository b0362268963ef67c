"""Channel ids: every index of every axis has an id, and ids that can only be removed together are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpress.errors import ModelError

Axis = NDArray[np.int64] | None
"""One id per index of an axis; None for an axis that never changes (batch, height, a user's input)."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its shape, and the ids of each of its axes."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]


class Ids:
    """Collects, while the graph is walked, which ids are one, which must stay, and what each tensor does with them."""

    def __init__(self) -> None:
        self.count = 0
        self.operation = ""  # what is walked now, for reasons and errors
        self.module = ""
        self.joined: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self.frozen: list[tuple[NDArray[np.int64], str]] = []
        self.roles: list[tuple[NDArray[np.int64], str, str]] = []

    @property
    def place(self) -> str:
        """Names the operation that is walked now and the module it comes from."""
        return f"{self.operation} of '{self.module or 'the model itself'}'" if self.operation else ""

    def fresh(self, size: int) -> NDArray[np.int64]:
        """Returns `size` new ids."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def unite(self, a: Axis, b: Axis) -> None:
        """Says that the ids of `a` and `b` [n each] are pairwise the same; what meets a fixed axis stays."""
        if a is None or b is None:
            self.freeze(a if b is None else b, "it meets a size that cannot change")
            return
        if len(a) != len(b):
            raise ModelError(f"{self.place}: {len(a)} and {len(b)} channels meet; report this graph as a bug")
        self.joined.append((a, b))

    def freeze(self, axis: Axis, why: str) -> None:
        """Says that the ids of `axis` must stay, because of `why`."""
        if axis is not None and len(axis):
            self.frozen.append((axis, f"{why} in {self.place}" if self.place else why))

    def mark(self, axis: Axis, role: str) -> None:
        """Says what the present module does with the ids: "write" (computes them), "read" (sums over) or "scale"."""
        if axis is not None:
            self.roles.append((axis, role, self.module))

    def labels(self) -> NDArray[np.int64]:
        """Returns the class [count] of each id: ids with one label are removed together or not at all."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        a, b = (_concatenate([pair[side] for pair in self.joined]) for side in (0, 1))
        edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def _concatenate(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
