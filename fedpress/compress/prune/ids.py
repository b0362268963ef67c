"""Gives each index of each axis of a tensor an id, and unites ids that must be pruned together.

Example: `a = conv1(x)` and `b = conv2(x)` with 16 channels each have ids 0..15 and 16..31. `a + b`
adds channel i of both, so ids i and 16 + i are united: they are one channel, which is kept in both
tensors or pruned from both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpress.errors import ModelError

Ints = NDArray[np.int64]
"""An array of ids or of indices."""
Axis = Ints | None
"""One id per index of an axis; None for an axis whose size is fixed (batch, height, an input)."""


@dataclass(frozen=True)
class Value:
    """A tensor in the captured graph: its shape, the ids of its axes, and what it is computed from.

    Attributes:
        shape: shape of the tensor.
        axes: for each axis its ids, or None if its size is fixed.
        zero_when_masked: whether it is zero where its channels are masked (set to 0). True for a
            weight and for its square, false for its exponential.
        from_weights: whether it is computed from parameters and buffers alone.
        has_parameter: whether it is computed from at least one parameter.
        from_input: whether it depends on the model's input.
        gathered_weights: whether it holds weights that the input selects, such as those of the
            chosen experts in a mixture of experts.
        channel_norm: whether it is a norm or a sum, such as the norm of each channel over height
            and width, or is computed from such a tensor alone.
        is_boolean: whether its type is bool.
        constant: the tensor itself, where it holds integers or booleans that are the same for every
            input.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    zero_when_masked: bool = False
    from_weights: bool = False
    has_parameter: bool = False
    from_input: bool = False
    gathered_weights: bool = False
    channel_norm: bool = False
    is_boolean: bool = False
    constant: Any = None


@dataclass(frozen=True)
class ForwardCall:
    """A call in a module's forward code with numbers in it, such as `x.view(n, 4, 8)`.

    Attributes:
        module: name of the module whose forward makes the call.
        place: file, line and column of the call (see `fedpress.nn.forward_sizes`).
        occurrence: 0 for the first call at this place in one forward, 1 for the second.
        numbers: the numbers among its arguments, in order.
        slice_starts: for an indexing, the position in `numbers` of each slice that takes only a
            part of its axis.
        index_tensors: how many tensors of indices are among its arguments.
    """

    module: str
    place: str
    occurrence: int
    numbers: list[Any]
    slice_starts: list[int]
    index_tensors: int = 0


SETS_OWN_NUMBERS = ForwardCall("", "", -1, [], [])
"""Stands for every call inside torch's attention, which computes its sizes from its tensors.

Pruning needs to correct no number in such code.
"""


@dataclass(frozen=True)
class SizeInCall:
    """A number in forward code that is the length of `axis`, or a multiple of it (`n * heads`).

    It must be corrected when channels of `axis` are pruned. `position` is its position among the
    numbers of the call.
    """

    call: ForwardCall
    position: int
    axis: Ints
    multiple: bool


@dataclass(frozen=True)
class IndicesInCall:
    """A tensor of indices in forward code, such as `index` in `x[:, index] = y`.

    `places` are the indices along its dimension `dim`. They select indices of `axis`, here axis 1
    of x.
    """

    call: ForwardCall
    dim: int
    axis: Ints
    places: Ints


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of an operation: `factor` for every combination of indices of `axes`.

    Example: a linear layer on 2 examples has factor 2 and the axes (inputs, outputs).
    """

    factor: int
    axes: tuple[Ints, ...]


@dataclass(frozen=True)
class SplitAxis:
    """A reshape of one axis into several factors, [n * m] -> [n, m], or of several into one.

    Only one of the factors can lose indices; the other factors keep all indices. Example: 32
    channels viewed as [4 heads, 8] can lose heads (8 ids each) or the same positions in every head
    (4 ids each), but not both, because the remaining channels must still have a shape [heads,
    width].

    Attributes:
        elements: the ids of the axis that is the product of the factors, arranged as [n, m, ...].
        axes: the ids [n], [m], ... of the factors.
        place: name of the operation, for the reason why channels are kept.
    """

    elements: Ints
    axes: tuple[Ints, ...]
    place: str


class ChannelIds:
    """Collects which ids are united, which are kept, and which modules use them.

    `Walk` goes through the model's graph and fills this object, operation by operation. To *unite*
    ids means that they are pruned together. To *keep* an id means that it cannot be pruned.
    """

    def __init__(self) -> None:
        self.count = 0

        # Settings of the user.
        self.ignored: frozenset[str] = frozenset()  # names of modules whose channels are all kept
        self.approximate: frozenset[str] = frozenset()  # kinds of norms that may lose channels

        # The operation that is walked now.
        self.module = ""
        self.operation = ""  # its name, for errors and for the reasons why channels are kept
        self.target: Any = None  # the operation as an ATen overload, which has its arguments' names
        self.outer = ""  # the operation in the user's code that was decomposed into it, if any
        self.call: ForwardCall | None = None
        self.is_used = True  # whether an output depends on it; otherwise it only has to run

        # Results of the walk.
        self.united: list[tuple[Ints, Ints]] = []  # pairs of axes: ids at the same index are united
        self.kept: list[tuple[Ints, str]] = []  # ids, reason
        self.roles: list[tuple[Ints, str, str]] = []  # ids of an axis, role, module
        self.splits: list[SplitAxis] = []
        self.preferred: list[Ints] = []  # axes, such as heads, that splits prune if they can
        self.sizes_in_calls: list[SizeInCall] = []
        self.indices_in_calls: list[IndicesInCall] = []
        self.approximated: list[str] = []  # modules whose norms may lose channels
        self.without_rule: list[tuple[str, str, list[Ints]]] = []  # module, reason, kept ids
        self.products: list[MultiplyAdds] = []
        # Positions in `products` of operations that do not depend on the input. They are computed
        # once per batch, so their cost does not grow with the batch size.
        self.without_input: set[int] = set()

    @property
    def place(self) -> str:
        """Text that names the present operation and its module, for errors and reasons."""
        if not self.operation:
            return ""
        return f"{self.outer or self.operation} of '{self.module or 'the model itself'}'"

    def fresh(self, size: int) -> Ints:
        """Returns `size` new ids, which are not united with any other id."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def unite(self, a: Axis, b: Axis) -> None:
        """Records that a[i] and b[i] are the same channel, for each i; both have n ids.

        If only one axis has ids, these are kept, because the other axis has a fixed size. If
        neither has ids, nothing is recorded.

        Raises:
            ModelError: if the axes have different lengths.
        """
        if a is None or b is None:
            self.keep(a if b is None else b, "it is combined with an axis of fixed size")
            return
        if len(a) != len(b):
            raise ModelError(
                (
                    f"an axis of {len(a)} channels is combined with one of {len(b)}, expected "
                    "equal lengths"
                ),
                place=self.place,
                cure="report this graph as a bug",
            )
        if a is not b:
            self.united.append((a, b))

    def keep(self, axis: Axis, why: str) -> None:
        """Records that no id of `axis` can be pruned, because of `why`."""
        if axis is not None and len(axis):
            self.kept.append((axis, f"{why} in {self.place}" if self.place else why))

    def keep_all(self, axes: Iterable[Axis], why: str) -> None:
        """Records that no id of several axes can be pruned, because of `why`."""
        for axis in axes:
            self.keep(axis, why)

    def mark_role(self, axis: Axis, role: str) -> None:
        """Records how the present operation's module uses the ids of one axis of its weight.

        Args:
            axis: ids of the axis.
            role: "write" for output channels, "read" for input channels, "scale" for a factor per
                channel.
        """
        if axis is not None:
            self.roles.append((axis, role, self.module))

    def split_axis(self, elements: Ints, axes: Sequence[Ints]) -> None:
        """Records a reshape: element [i, j, ...] is index i of the first axis, j of the second."""
        self.splits.append(SplitAxis(elements, tuple(axes), self.place))

    def prefer_axis(self, axis: Axis) -> None:
        """Records that a reshape should prune `axis` (such as heads) if it has a choice."""
        if axis is not None:
            self.preferred.append(axis)

    def may_prune_through(self, kind: str, axis: Axis) -> bool:
        """Returns whether the user allows pruning of channels that this kind of norm averages over.

        If so, the present operation's module is recorded as approximate.
        """
        if axis is None or kind not in self.approximate:
            return False
        if self.module not in self.approximated:
            self.approximated.append(self.module)
        return True

    def note_size(self, position: int, axis: Axis, *, multiple: bool = False) -> None:
        """Records that the number at `position` of the present call is the length of `axis`.

        Args:
            position: position of the number among all numbers of the call.
            axis: the axis whose length the number is.
            multiple: whether the number is a multiple of that length, such as `n * heads`.
        """
        if axis is not None and self.call is not None and self.call is not SETS_OWN_NUMBERS:
            self.sizes_in_calls.append(SizeInCall(self.call, position, axis, multiple))

    def note_indices(self, dim: int, axis: Axis, places: Ints) -> None:
        """Records that the indices in the present call, along `dim`, are `places` on `axis`.

        The indices are renumbered when channels are pruned. If the call does not have exactly one
        tensor of indices, `axis` is kept.
        """
        if axis is None or self.call is SETS_OWN_NUMBERS:
            return
        if self.call is None or self.call.index_tensors != 1:
            self.keep(axis, "channels are written by their index")
            return
        self.indices_in_calls.append(IndicesInCall(self.call, dim, axis, places))

    def count_multiply_adds(self, factor: int, *axes: Axis | int) -> None:
        """Counts `factor` multiply-adds for every combination of indices of `axes`.

        Args:
            factor: number that does not depend on channels, for instance the number of pixels.
            axes: the ids of each axis, or the size of an axis without ids.
        """
        with_ids = []
        for axis in axes:
            if isinstance(axis, int):
                factor *= axis
            elif axis is not None:
                with_ids.append(axis)
        self.products.append(MultiplyAdds(int(factor), tuple(with_ids)))

    def next_slice_start(self) -> int | None:
        """Returns the position of the next slice's first number in the present call.

        Returns None if the call is unknown or has no further slice. An indexing such as
        `x[:4, 2:]` is captured as one operation per slice, in the order of the code, so each
        operation takes the next position.
        """
        if self.call is None or not self.call.slice_starts:
            return None
        return self.call.slice_starts.pop(0)

    def resolve_splits(self) -> None:
        """Decides for each split which one of its axes may lose indices.

        If only one axis can, that axis is taken. If several can, a preferred one (heads) is taken,
        else the longest.
        """
        undecided = self.splits
        while undecided:
            labels = self.labels()
            kept = self._kept_labels(labels)
            choices = []
            decided = []
            for split in undecided:
                choice = (split, self._prunable_axes(split, labels, kept))
                choices.append(choice)
                # Splits with a choice wait: a decision elsewhere may leave them only one axis.
                if len(choice[1]) <= 1:
                    decided.append(choice)
            if not decided:
                decided.append(self._choose(choices, labels))
            for split, prunable in decided:
                self._decide(split, prunable[0] if prunable else None)

            # Each decision unites and keeps ids, which changes the choices of the other splits.
            done = {id(split) for split, _ in decided}
            undecided = [split for split in undecided if id(split) not in done]

    def _kept_labels(self, labels: Ints) -> NDArray[np.bool_]:
        """Returns for each label whether its channel is kept."""
        kept = np.zeros(self.count, bool)
        for axis, _ in self.kept:
            kept[labels[axis]] = True
        return kept

    def _prunable_axes(self, split: SplitAxis, labels: Ints, kept: NDArray[np.bool_]) -> list[int]:
        """Returns the positions of the axes that have a prunable index.

        An index is prunable if neither its own id nor any of its elements is kept.
        """
        kept_elements = kept[labels[split.elements]]
        found = []
        for i, axis in enumerate(split.axes):
            others = tuple(d for d in range(kept_elements.ndim) if d != i)
            kept_indices = kept[labels[axis]] | kept_elements.any(others)
            if not kept_indices.all():
                found.append(i)
        return found

    def _choose(
        self, choices: Sequence[tuple[SplitAxis, list[int]]], labels: Ints
    ) -> tuple[SplitAxis, list[int]]:
        """Returns the split to decide next, and its axis to prune.

        It is the first split with a preferred axis. If there is none, it is the first split, and
        its longest prunable axis.
        """
        preferred = np.zeros(self.count, bool)
        for axis in self.preferred:
            preferred[labels[axis]] = True
        for split, prunable in choices:
            for i in prunable:
                if preferred[labels[split.axes[i]]].any():
                    return split, [i]

        # Each index of the longest axis has the fewest elements, so pruning can come closest to any
        # target.
        split, prunable = choices[0]
        return split, [max(prunable, key=lambda i: len(split.axes[i]))]

    def _decide(self, split: SplitAxis, chosen: int | None) -> None:
        """Makes the indices of axis number `chosen` prunable, and keeps all other axes."""
        why = f"an axis is reshaped, and these channels of it cannot be pruned, in {split.place}"
        for i, axis in enumerate(split.axes):
            if i != chosen:
                self.kept.append((axis, why))
                continue
            # Every element of slice i becomes one channel with index i of the axis.
            shape = [1] * split.elements.ndim
            shape[i] = -1
            owner = np.broadcast_to(axis.reshape(shape), split.elements.shape)
            self.united.append((split.elements.ravel(), owner.ravel()))
        if chosen is None:
            self.kept.append((split.elements.ravel(), why))

    def labels(self) -> Ints:
        """Returns the label of each id, [count]; ids with the same label are pruned together."""
        # Imported here because scipy takes long to import and only tracing needs it.
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        a = _concatenate([first for first, _ in self.united])
        b = _concatenate([second for _, second in self.united])
        edges = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(self.count, self.count))
        return np.asarray(connected_components(edges, directed=False)[1], dtype=np.int64)


def ids_or_sizes(shape: Sequence[int], axes: Sequence[Axis]) -> list[Any]:
    """Returns the ids of each axis, or its size if it has none: for `count_multiply_adds`."""
    found: list[Any] = []
    for size, axis in zip(shape, axes, strict=True):
        found.append(size if axis is None else axis)
    return found


def _concatenate(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)
