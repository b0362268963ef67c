"""Which calls in a model's forward code have numbers in them, noted while `torch.export` captures the model."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import traceback
from torch.overrides import TorchFunctionMode

from fedpress.compress.prune.ids import Call
from fedpress.nn.forward_sizes import INDEXING, SIZED, caller, indices_of, numbers_of

TAG = "fedpress_call"
"""Where a node's metadata hold the index of the call that it comes from; -1 for a module that sets its numbers."""


class Recorder(TorchFunctionMode):
    """Notes the calls with numbers in each module's forward, and tags the nodes that come from them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        # By what a module holds: `torch.export` may run a shallow copy of one.
        self._names = {id(module._parameters): name for name, module in model.named_modules()}
        self._turns: dict[int, Counter[str]] = {}
        self._model, self._hooks = model, list[Any]()

    def __enter__(self) -> Recorder:
        """Starts to note."""
        for module in self._model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._begin))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stops."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def turns(self) -> dict[tuple[str, str], int]:
        """Returns how often each place of a module was reached; of several runs of a module, in the longest."""
        found: dict[tuple[str, str], int] = {}
        for call in self.calls:
            key = call.module, call.place
            found[key] = max(found.get(key, 0), call.turn + 1)
        return found

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._turns[id(module._parameters)] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`."""
        if func is F.multi_head_attention_forward:
            with traceback.annotate({TAG: -1}):
                return func(*args, **(kwargs or {}))
        options = kwargs or {}
        by = caller(func) if func in SIZED else None
        name = None if by is None else self._names.get(id(by.module._parameters))
        if by is None or name is None or id(by.module._parameters) not in self._turns:
            return func(*args, **options)
        turns = self._turns[id(by.module._parameters)]
        slices = _slice_positions(*args[:2]) if func in INDEXING else []
        numbers = numbers_of(func, args, options)
        indices = len(indices_of(func, args, options))
        self.calls.append(Call(name, by.place, turns[by.place], numbers, slices, indices))
        turns[by.place] += 1
        with traceback.annotate({TAG: len(self.calls) - 1}):
            return func(*args, **options)


def _slice_positions(x: Tensor, index: Any) -> list[int]:
    """Returns at which of the numbers of an indexing each slice begins that takes only a part of its axis.

    A slice has three numbers, an index one. Example: `x[3, :, 2:4]` has the numbers 3 (position 0), those of `:`
    (positions 1 to 3) and those of `2:4` (positions 4 to 6), which begins at 4.
    """
    items = index if isinstance(index, tuple) else (index,)
    skipped = x.dim() - sum(_dims_taken(item) for item in items)  # what an ellipsis stands for
    positions = []
    position = dim = 0
    for item in items:
        if isinstance(item, slice) and item.indices(x.shape[dim]) != (0, x.shape[dim], 1):
            positions.append(position)
        position += _numbers_taken(item)
        dim += skipped if item is Ellipsis else _dims_taken(item)
    return positions


def _dims_taken(item: Any) -> int:
    """Returns how many axes of a tensor one item of an indexing names."""
    if item is None or item is Ellipsis or isinstance(item, bool):
        return 0
    if isinstance(item, Tensor) and item.dtype == torch.bool:
        return item.dim()
    return 1


def _numbers_taken(item: Any) -> int:
    """Returns how many numbers of the call one item of an indexing has."""
    if isinstance(item, slice):
        return 3
    if isinstance(item, list):
        return len(item)
    return 0 if item is None or item is Ellipsis or isinstance(item, Tensor | bool) else 1
