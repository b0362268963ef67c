"""Channel ids: every index of every axis has an id, and ids that can only be pruned together are joined."""

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
    """A tensor of the graph: its shape, the ids of each of its axes, and what is known of where it comes from.

    Attributes:
        shape: of the tensor.
        axes: one entry for each axis.
        zero: it holds weights, or powers of them, so that masked channels are zero.
        weights: it is computed from parameters and buffers alone.
        trained: a parameter is among them.
        from_input: it depends on what the model is given.
        selected: weights that the input selects, of a mixture's experts for instance.
        pooled: it holds a norm of each channel over space.
        boolean: its type is bool.
        known: the tensor itself, of whole numbers or booleans that are the same for every input.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    zero: bool = False
    weights: bool = False
    trained: bool = False
    from_input: bool = False
    selected: bool = False
    pooled: bool = False
    boolean: bool = False
    known: Any = None


@dataclass(frozen=True)
class Call:
    """A call in a module's forward code that has numbers in it.

    Attributes:
        module: name of the module whose forward makes the call.
        place: where in the code it stands.
        turn: 0 for the first call at this place in one forward, 1 for the second.
        numbers: those among its arguments.
        slices: of an indexing: where the numbers of each slice begin that takes part of an axis.
        indices: how many tensors of indices are among its arguments.
    """

    module: str
    place: str
    turn: int
    numbers: list[Any]
    slices: list[int]
    indices: int = 0


REBUILT = Call("", "", -1, [], [])
"""Stands for calls inside a module that sets all its numbers itself, by its tensors."""


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
class MultiplyAdds:
    """Multiply-adds: `times` for every combination of indices of `axes`."""

    times: int
    axes: tuple[Ints, ...]


@dataclass(frozen=True)
class SplitAxis:
    """One axis that is several at the same time: a reshape cuts [n * m] into [n, m], or joins [n, m].

    Whole slices of one of the axes can be pruned; all indices of the others are kept.

    Attributes:
        elements: the ids [n, m, ...] of the joined axis.
        axes: the ids [n], [m], ... of the others.
        place: the operation, for reasons.
    """

    elements: Ints
    axes: tuple[Ints, ...]
    place: str


class Ids:
    """Collects, while the graph is walked, which ids are one, which are kept, and what each tensor does with them."""

    def __init__(self) -> None:
        self.count = 0
        # What the user wants.
        self.ignored: frozenset[str] = frozenset()  # names of modules whose channels are all kept
        self.approximate: frozenset[str] = frozenset()  # kinds of norms that may be cut through
        # Where the walk is.
        self.module = ""
        self.operation = ""  # for reasons and errors
        self.target: Any = None  # the same as an overload of ATen, with the names of its arguments
        self.outer = ""  # what it is a part of, where an operation was taken apart
        self.call: Call | None = None
        self.is_used = True  # whether an output depends on it; else it only has to run
        # What was found.
        self.joined: list[tuple[Ints, Ints]] = []
        self.kept: list[tuple[Ints, str]] = []
        self.roles: list[tuple[Ints, str, str]] = []
        self.splits: list[SplitAxis] = []
        self.preferred: list[Ints] = []
        self.sized: list[Sized] = []
        self.written: list[Written] = []
        self.approximated: list[str] = []  # modules with norms that were cut through, in order
        self.without_rule: list[tuple[str, str, list[Ints]]] = []  # module, reason, what it keeps
        self.products: list[MultiplyAdds] = []
        # Products that no input has a part in: as many for a batch as for one example.
        self.without_input: set[int] = set()

    @property
    def place(self) -> str:
        """Names the operation that is walked now and the module it comes from."""
        if not self.operation:
            return ""
        return f"{self.outer or self.operation} of '{self.module or 'the model itself'}'"

    def fresh(self, size: int) -> Ints:
        """Returns `size` new ids."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def unite(self, a: Axis, b: Axis) -> None:
        """Says that the ids of `a` and `b` [n each] are pairwise the same; what meets a fixed axis is kept."""
        if a is None or b is None:
            self.keep(a if b is None else b, "it meets a size that cannot change")
            return
        if len(a) != len(b):
            raise ModelError(
                f"{len(a)} and {len(b)} channels meet",
                place=self.place,
                cure="report this graph as a bug",
            )
        if a is not b:
            self.joined.append((a, b))

    def keep(self, axis: Axis, why: str) -> None:
        """Says that the ids of `axis` cannot be pruned, because of `why`."""
        if axis is not None and len(axis):
            self.kept.append((axis, f"{why} in {self.place}" if self.place else why))

    def mark(self, axis: Axis, role: str) -> None:
        """Says what the present module does with the ids: "write" (computes them), "read" (sums over) or "scale"."""
        if axis is not None:
            self.roles.append((axis, role, self.module))

    def split_axis(self, elements: Ints, axes: Sequence[Ints]) -> None:
        """Says that element [i, j, ...] is index i of the first axis and j of the second."""
        self.splits.append(SplitAxis(elements, tuple(axes), self.place))

    def prefer(self, axis: Axis) -> None:
        """Says that `axis` is the one to lose slices (heads of attention), where a split leaves the choice."""
        if axis is not None:
            self.preferred.append(axis)

    def pass_norm(self, kind: str, axis: Axis) -> bool:
        """Says whether channels may be cut although a norm of this kind averages over them, and notes where."""
        if axis is None or kind not in self.approximate:
            return False
        if self.module not in self.approximated:
            self.approximated.append(self.module)
        return True

    def note_size(self, position: int, axis: Axis, *, multiple: bool = False) -> None:
        """Says that a number in the present call is the length of `axis` (or a multiple of it)."""
        if axis is not None and self.call is not None and self.call is not REBUILT:
            self.sized.append(Sized(self.call, position, axis, multiple))

    def note_indices(self, dim: int, axis: Axis, places: Ints) -> None:
        """Says that the indices in the present call, along `dim`, are `places` on `axis`; they must follow it.

        Where the code has no tensor of indices that could be exchanged, `axis` is kept.
        """
        if axis is None or self.call is REBUILT:
            return
        if self.call is None or self.call.indices != 1:
            self.keep(axis, "channels are written by number")
            return
        self.written.append(Written(self.call, dim, axis, places))

    def multiply(self, times: int, *axes: Axis | int) -> None:
        """Counts multiply-adds: `times` for all combinations of the indices of `axes` (sizes, where fixed)."""
        for axis in axes:
            if isinstance(axis, int):
                times *= axis
        ids = tuple(axis for axis in axes if isinstance(axis, np.ndarray))
        self.products.append(MultiplyAdds(int(times), ids))

    def next_slice(self) -> int | None:
        """Returns where the numbers of the next slice of the present indexing begin; None if they are not known."""
        return self.call.slices.pop(0) if self.call is not None and self.call.slices else None

    def resolve_splits(self) -> None:
        """Decides for each split which of its axes may lose indices: the one that is left, else the preferred one."""
        undecided = self.splits
        while undecided:
            labels = self.labels()
            kept = np.zeros(self.count, bool)
            for axis, _ in self.kept:
                kept[labels[axis]] = True
            choices = [(split, self._prunable_axes(split, labels, kept)) for split in undecided]
            decided = [(split, prunable) for split, prunable in choices if len(prunable) <= 1]
            if not decided:
                decided = [self._choose(choices, labels)]
            for split, prunable in decided:
                self._decide(split, prunable[0] if prunable else None)
            # Each decision joins and keeps ids, so the others are looked at anew.
            done = {id(split) for split, _ in decided}
            undecided = [split for split in undecided if id(split) not in done]

    def _prunable_axes(self, split: SplitAxis, labels: Ints, kept: NDArray[np.bool_]) -> list[int]:
        """Returns the axes of which at least one index could go with all its elements."""
        held = kept[labels[split.elements]]
        found = []
        for i, axis in enumerate(split.axes):
            others = tuple(d for d in range(held.ndim) if d != i)
            if not (kept[labels[axis]] | held.any(others)).all():
                found.append(i)
        return found

    def _choose(
        self, choices: Sequence[tuple[SplitAxis, list[int]]], labels: Ints
    ) -> tuple[SplitAxis, list[int]]:
        """Returns the first split with a preferred axis, and that axis; else one split and its longest axis."""
        wanted = np.zeros(self.count, bool)
        for axis in self.preferred:
            wanted[labels[axis]] = True
        for split, prunable in choices:
            for i in prunable:
                if wanted[labels[split.axes[i]]].any():
                    return split, [i]
        split, prunable = choices[0]
        return split, [max(prunable, key=lambda i: len(split.axes[i]))]

    def _decide(self, split: SplitAxis, chosen: int | None) -> None:
        """Lets whole slices of the chosen axis be pruned, and keeps all others."""
        why = f"no part of a cut axis can go in {split.place}"
        for i, axis in enumerate(split.axes):
            if i == chosen:
                shape = [-1 if d == i else 1 for d in range(split.elements.ndim)]
                owner = np.broadcast_to(axis.reshape(shape), split.elements.shape)
                self.joined.append((split.elements.ravel(), owner.ravel()))
            else:
                self.kept.append((axis, why))
        if chosen is None:
            self.kept.append((split.elements.ravel(), why))

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
