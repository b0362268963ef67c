"""Channel ids: every index of every axis has an id, and ids that can only be removed together are joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpress.errors import ModelError

Ints = NDArray[np.int64]
Axis = Ints | None
"""One id per index of an axis; None for an axis that never changes (batch, height, a user's input)."""


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its shape, and the ids of each of its axes."""

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    zero: bool = False  # it holds weights, or powers of them, so that masked channels are zero
    weights: bool = False  # it is computed from parameters and buffers alone
    trained: bool = False  # a parameter is among them
    given: bool = False  # it depends on what the model is given
    chosen: bool = False  # weights that are chosen by what the model is given: of its experts, say
    pooled: bool = False  # it holds a norm of each channel over space
    boolean: bool = False
    known: Any = (
        None  # the tensor itself, of whole numbers or booleans that are the same for every input
    )


@dataclass(frozen=True)
class Call:
    """A call in a module's forward code that has numbers in it: its module, its place, and which call there it is."""

    module: str
    place: str
    turn: int  # 0 for the first call at this place in one forward, 1 for the second
    numbers: list[Any]
    slices: list[
        int
    ]  # of an indexing: where the numbers of each slice begin that takes part of an axis
    indices: int = 0  # how many tensors of indices are among its arguments


REBUILT = Call("", "", -1, [], [])
"""Stands for calls inside a module that mends all its numbers itself, by its tensors."""


@dataclass(frozen=True)
class Sized:
    """A number in a call that is the length of `axis`, or a multiple of it that also counts examples or pixels."""

    call: Call
    position: int
    axis: Ints
    multiple: bool


@dataclass(frozen=True)
class Written:
    """The tensor of indices in a call that names, along its dimension `dim`, where on `axis` something is written."""

    call: Call
    dim: int
    axis: Ints
    places: Ints


@dataclass(frozen=True)
class Product:
    """Multiply-adds: `times` for every combination of indices of `axes`."""

    times: int
    axes: tuple[Ints, ...]


@dataclass(frozen=True)
class Grid:
    """An axis that is cut into several, or several that become one: all but one of them must stay whole."""

    elements: Ints  # [n, m, ...]
    axes: tuple[Ints, ...]  # [n], [m], ...
    place: str


class Ids:
    """Collects, while the graph is walked, which ids are one, which must stay, and what each tensor does with them."""

    def __init__(self) -> None:
        self.count = 0
        self.operation = ""  # what is walked now, for reasons and errors
        self.target: Any = None  # the same as an overload of ATen, with the names of its arguments
        self.ignored: frozenset[str] = frozenset()  # names of modules whose channels all stay
        self.approximate: frozenset[str] = frozenset()  # kinds of norms that may be cut through
        self.approximated: list[str] = []  # the modules in which one was, in order
        self.outer = ""  # what it is a part of, where an operation was taken apart
        self.module = ""
        self.read = True  # whether an output depends on it; else its value may be another, but it has to run
        self.call: Call | None = None
        self.joined: list[tuple[Ints, Ints]] = []
        self.frozen: list[tuple[Ints, str]] = []
        self.roles: list[tuple[Ints, str, str]] = []
        self.grids: list[Grid] = []
        self.preferred: list[Ints] = []
        self.sized: list[Sized] = []
        self.written: list[Written] = []
        self.ruleless: list[
            tuple[str, str, list[Ints]]
        ] = []  # module, why an operation freezes what, and what
        self.products: list[Product] = []
        self.alone: set[int] = (
            set()
        )  # products that no input has a part in: as many for a batch as for one example

    @property
    def place(self) -> str:
        """Names the operation that is walked now and the module it comes from."""
        return (
            f"{self.outer or self.operation} of '{self.module or 'the model itself'}'"
            if self.operation
            else ""
        )

    def fresh(self, size: int) -> Ints:
        """Returns `size` new ids."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def unite(self, a: Axis, b: Axis) -> None:
        """Says that the ids of `a` and `b` [n each] are pairwise the same; what meets a fixed axis stays."""
        if a is None or b is None:
            self.freeze(a if b is None else b, "it meets a size that cannot change")
            return
        if len(a) != len(b):
            raise ModelError(
                f"{self.place}: {len(a)} and {len(b)} channels meet; report this graph as a bug"
            )
        if a is not b:
            self.joined.append((a, b))

    def freeze(self, axis: Axis, why: str) -> None:
        """Says that the ids of `axis` must stay, because of `why`."""
        if axis is not None and len(axis):
            self.frozen.append((axis, f"{why} in {self.place}" if self.place else why))

    def mark(self, axis: Axis, role: str) -> None:
        """Says what the present module does with the ids: "write" (computes them), "read" (sums over) or "scale"."""
        if axis is not None:
            self.roles.append((axis, role, self.module))

    def grid(self, elements: Ints, axes: Sequence[Ints]) -> None:
        """Says that element [i, j, ...] is index i of the first axis, j of the second: whole slices go, one way."""
        self.grids.append(Grid(elements, tuple(axes), self.place))

    def prefer(self, axis: Axis) -> None:
        """Says that `axis` is the one to lose slices (heads of attention), where a grid leaves the choice."""
        if axis is not None:
            self.preferred.append(axis)

    def pass_norm(self, kind: str, axis: Axis) -> bool:
        """Says whether channels may be cut although a norm of this kind averages over them, and notes where."""
        if axis is None or kind not in self.approximate:
            return False
        if self.module not in self.approximated:
            self.approximated.append(self.module)
        return True

    def number(self, position: int, axis: Axis, *, multiple: bool = False) -> None:
        """Says that a number in the present call is the length of `axis` (or a multiple of it)."""
        if axis is not None and self.call is not None and self.call is not REBUILT:
            self.sized.append(Sized(self.call, position, axis, multiple))

    def write(self, dim: int, axis: Axis, places: Ints) -> None:
        """Says that the indices in the present call, along `dim`, are `places` on `axis`; they must follow it.

        Where the code has no tensor of indices that could be exchanged, `axis` stays.
        """
        if axis is None or self.call is REBUILT:
            return
        if self.call is None or self.call.indices != 1:
            self.freeze(axis, "channels are written by number")
            return
        self.written.append(Written(self.call, dim, axis, places))

    def multiply(self, times: int, *axes: Axis | int) -> None:
        """Counts multiply-adds: `times` for all combinations of the indices of `axes` (sizes, where fixed)."""
        fixed = [a for a in axes if isinstance(a, int)]
        self.products.append(
            Product(
                int(np.prod([times, *fixed])), tuple(a for a in axes if isinstance(a, np.ndarray))
            )
        )

    def next_slice(self) -> int | None:
        """Returns where the numbers of the next slice of the present indexing begin; None if they are not known."""
        return self.call.slices.pop(0) if self.call is not None and self.call.slices else None

    def settle(self) -> None:
        """Decides for each grid which of its axes may lose indices: the one that is left, else the preferred one."""
        open_grids = self.grids
        while open_grids:
            labels = self.labels()
            stuck = np.zeros(self.count, bool)
            for axis, _ in self.frozen:
                stuck[labels[axis]] = True
            choices = [(grid, self._free(grid, labels, stuck)) for grid in open_grids]
            sure = [(grid, free) for grid, free in choices if len(free) <= 1]
            if not sure:
                sure = [self._choose(choices, labels)]
            for grid, free in sure:
                self._decide(grid, free[0] if free else None)
            done = {id(grid) for grid, _ in sure}
            open_grids = [grid for grid in open_grids if id(grid) not in done]

    def _free(self, grid: Grid, labels: Ints, stuck: NDArray[np.bool_]) -> list[int]:
        """Returns the axes of which at least one index could go with all its elements."""
        held = stuck[labels[grid.elements]]
        others = [tuple(d for d in range(held.ndim) if d != i) for i in range(held.ndim)]
        return [
            i
            for i, axis in enumerate(grid.axes)
            if not (stuck[labels[axis]] | held.any(others[i])).all()
        ]

    def _choose(
        self, choices: Sequence[tuple[Grid, list[int]]], labels: Ints
    ) -> tuple[Grid, list[int]]:
        wanted = np.zeros(self.count, bool)
        for axis in self.preferred:
            wanted[labels[axis]] = True
        for grid, free in choices:
            for i in free:
                if wanted[labels[grid.axes[i]]].any():
                    return grid, [i]
        grid, free = choices[0]
        return grid, [max(free, key=lambda i: len(grid.axes[i]))]

    def _decide(self, grid: Grid, carrier: int | None) -> None:
        why = f"no part of a cut axis can go in {grid.place}"
        for i, axis in enumerate(grid.axes):
            if i == carrier:
                shape = [-1 if d == i else 1 for d in range(grid.elements.ndim)]
                spread = np.broadcast_to(axis.reshape(shape), grid.elements.shape)
                self.joined.append((grid.elements.ravel(), spread.ravel()))
            else:
                self.frozen.append((axis, why))
        if carrier is None:
            self.frozen.append((grid.elements.ravel(), why))

    def labels(self) -> Ints:
        """Returns the class [count] of each id: ids with one label are removed together or not at all."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        a, b = (_concatenate([pair[side] for pair in self.joined]) for side in (0, 1))
        edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def sizes(shape: Sequence[int], axes: Sequence[Axis]) -> list[Any]:
    """Returns the ids of each axis, or its size where it is fixed: what `Ids.multiply` takes."""
    return [n if axis is None else axis for n, axis in zip(shape, axes, strict=True)]


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
