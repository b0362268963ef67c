"""Records calls such as `x.view(n, 4, 8)` in forward code while `torch.export` captures a model.

Their numbers may be sizes that must be corrected after pruning. The captured graph alone does not
say where in the code a number is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from fedpress.compress.prune.ids import ForwardCall
from fedpress.nn.forward_sizes import INDEXING, SIZED, find_call_site, indices_of, numbers_of

CALL_TAG = "fedpress_call"
"""Key in a node's metadata for the index of its call in `Recorder.calls`.

The index is -1 for nodes of torch's attention, which computes all sizes from its tensors.
"""


class Recorder(TorchFunctionMode):
    """Records the calls with numbers in each module's forward, and tags the nodes they produce.

    Use it as a context around `torch.export.export`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[ForwardCall] = []
        self._model = model
        self._hooks: list[Any] = []
        # A module is recognised by its dictionary of parameters, because `torch.export` may run a
        # shallow copy of the module, which shares that dictionary.
        self._names = {id(module._parameters): name for name, module in model.named_modules()}
        # For each module: how often each place was reached in its latest forward.
        self._counts: dict[int, Counter[str]] = {}
        self._depth = 0  # how many forwards of the model run

    def __enter__(self) -> Recorder:
        """Starts recording."""
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
        # Only during forward: `torch.export` reads thousands of attributes of tensors before and
        # after it, and a mode costs time at each of them. The first to start and the last to end,
        # so that the modes which correct numbers of an earlier pruning are handled before it.
        start = self._model.register_forward_pre_hook(self._start, prepend=True)
        end = self._model.register_forward_hook(self._end, always_call=True)
        self._hooks += [start, end]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops recording."""
        for hook in self._hooks:
            hook.remove()

    def call_counts(self) -> dict[tuple[str, str], int]:
        """Returns how many calls one forward makes at each place: (module, place) -> calls.

        A place is file, line and column. If a module runs several times, the forward with the most
        calls counts.
        """
        found: dict[tuple[str, str], int] = {}
        for call in self.calls:
            key = call.module, call.place
            found[key] = max(found.get(key, 0), call.occurrence + 1)
        return found

    def _start(self, module: nn.Module, _: Any) -> None:
        # A model may call itself within its forward.
        if self._depth == 0:
            super().__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._counts[id(module._parameters)] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, and records the call if it has numbers and is in a module's forward."""
        options = kwargs or {}
        if func is F.multi_head_attention_forward:
            # It takes every size from its tensors, or from attributes that pruning updates.
            with traceback.annotate({CALL_TAG: -1}):
                return func(*args, **options)

        found = find_call_site(func) if func in SIZED else None
        if found is None:
            return func(*args, **options)
        key = id(found.module._parameters)
        name = self._names.get(key)
        counts = self._counts.get(key)
        # No name: the module is not part of the model. No counts: its code runs outside of forward.
        if name is None or counts is None:
            return func(*args, **options)

        call = ForwardCall(
            module=name,
            place=found.place,
            occurrence=counts[found.place],
            numbers=numbers_of(func, args, options),
            slice_starts=_slice_positions(*args[:2]) if func in INDEXING else [],
            index_tensors=len(indices_of(func, args, options)),
        )
        self.calls.append(call)
        # Counted after the call is recorded: the first occurrence is 0.
        counts[found.place] += 1
        with traceback.annotate({CALL_TAG: len(self.calls) - 1}):
            return func(*args, **options)


def _slice_positions(x: Tensor, index: Any) -> list[int]:
    """Returns the positions where the numbers of the slices begin, except for full slices (`:`).

    A slice has three numbers (start, stop, step), an index has one. Example: `x[3, :, 2:4]` has the
    number 3 at position 0, `:` at positions 1 to 3 and `2:4` at positions 4 to 6; the result is
    [4].
    """
    items = index if isinstance(index, tuple) else (index,)
    under_ellipsis = x.dim() - sum(_dims_taken(item) for item in items)
    positions = []
    position = dim = 0
    for item in items:
        if isinstance(item, slice):
            size = x.shape[dim]
            if item.indices(size) != (0, size, 1):
                positions.append(position)
        position += _numbers_taken(item)
        dim += under_ellipsis if item is Ellipsis else _dims_taken(item)
    return positions


def _dims_taken(item: Any) -> int:
    """Returns how many axes of a tensor one item of an index covers (an ellipsis counts 0)."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def _numbers_taken(item: Any) -> int:
    """Returns how many numbers one item of an index adds to those recorded for the call."""
    if isinstance(item, slice):
        return 3
    if isinstance(item, list):
        return len(item)
    if item is None or item is Ellipsis or isinstance(item, Tensor | bool):
        return 0
    return 1
