"""Numbers in a module's forward code: `view(n, 4, 8)`, `split([4, 12])`, `x[:, :16]`, and how to put others in place.

Sizes that are written into code, or kept in attributes, do not follow tensors that became smaller. Such a number is
named by its module, by the how-manieth call with numbers in that module's forward it stands in, and by its position
among the numbers of that call. A module with corrections watches its own calls as it runs and passes the right ones;
code and weights are as the user made them. Forward code must make the same such calls each time.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode

Number = int | tuple[int, int]
"""What stands in the place of a number: another one, or (new, old): as many times `new` as it was times `old`."""
Numbers = dict[str, dict[int, dict[int, Number]]]
"""Module -> index of the call -> position in the call -> number."""

SIZED: dict[Callable[..., Any], tuple[str, ...]] = {
    Tensor.view: ("size",),
    Tensor.reshape: ("shape",),
    torch.reshape: ("shape",),
    Tensor.unflatten: ("dim", "sizes"),
    torch.unflatten: ("dim", "sizes"),
    Tensor.split: ("split_size", "dim"),
    torch.split: ("split_size_or_sections", "dim"),
    Tensor.split_with_sizes: ("split_sizes", "dim"),
    torch.split_with_sizes: ("split_sizes", "dim"),
    Tensor.narrow: ("dim", "start", "length"),
    torch.narrow: ("dim", "start", "length"),
    Tensor.expand: ("size",),
    Tensor.__getitem__: (),
    Tensor.__setitem__: (),
    F.pad: ("pad", "mode", "value"),
    F.group_norm: ("num_groups",),
    torch.zeros: ("size",),
    torch.ones: ("size",),
    torch.full: ("size", "fill_value"),
    Tensor.new_zeros: ("size",),
    Tensor.new_ones: ("size",),
    Tensor.new_full: ("size", "fill_value"),
}
"""Functions whose numbers may be sizes of channel axes, with the names of their arguments in order."""


INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def numbers_of(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> list[Any]:
    """Returns the numbers of a call in order; three for each slice, None where it has none.

    >>> numbers_of(Tensor.reshape, (torch.zeros(8), (2, 4)), {})
    [2, 4]
    >>> numbers_of(Tensor.__getitem__, (torch.zeros(2, 8), (0, slice(4, None))), {})
    [0, 4, None, None]
    """
    found: list[Any] = []

    def see(number: Any) -> Any:
        found.append(number)
        return number

    _map(_arranged(function, args, options), see)
    return found


def with_numbers(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any], right: Mapping[int, Number]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with the numbers at some positions replaced; -1 ("what is left") stays.

    >>> with_numbers(Tensor.reshape, (torch.zeros(12), (2, 8)), {}, {1: 6})[0][1]
    (2, 6)
    """
    at = -1

    def put(number: Any) -> Any:
        nonlocal at
        at += 1
        new = right.get(at)
        if new is None or (isinstance(number, int) and number == -1 and function not in INDEXING):
            return number
        return number * new[0] // new[1] if isinstance(new, tuple | list) else new

    first, rest, named = _arranged(function, args, options)
    first, rest, named = _map((first, rest, named), put)
    return (*first, *rest), dict(named)


def _arranged(function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Returns (tensors, other arguments, named ones in the order of the signature)."""
    tensors = 1 if args and isinstance(args[0], Tensor) else 0
    order = {name: i for i, name in enumerate(SIZED[function])}
    named = sorted(options.items(), key=lambda item: order.get(item[0], len(order)))
    return tuple(args[:tensors]), tuple(args[tensors:]), tuple(named)


def _map(tree: Any, see: Callable[[Any], Any]) -> Any:
    if isinstance(tree, slice):
        return slice(see(tree.start), see(tree.stop), see(tree.step))
    if isinstance(tree, tuple | list):
        items = [_map(item, see) for item in tree]
        return items if isinstance(tree, list) else tuple(items)
    if isinstance(tree, int | SymInt) and not isinstance(tree, bool):
        return see(tree)
    return tree


def caller() -> nn.Module | None:
    """Returns the module whose method makes the present call of a torch function."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module
    return None


class Watch(TorchFunctionMode):
    """Passes the right numbers to the calls of one module while it is active, and may note what the code passed."""

    def __init__(self, module: nn.Module, right: Mapping[int, Mapping[int, Number]], seen: dict[int, list[Any]] | None):
        super().__init__()
        self.module, self.right, self.seen, self.count = module, right, seen, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, with other numbers where this call has some."""
        options = kwargs or {}
        if func in SIZED and caller() is self.module:
            right = self.right.get(self.count)
            if self.seen is not None:
                self.seen[self.count] = numbers_of(func, args, options)
            self.count += 1
            if right:
                args, options = with_numbers(func, args, options, right)
        return func(*args, **options)


class Begin:
    """The hook before a module's forward: a new `Watch` with its table of right numbers."""

    def __init__(self, right: Mapping[int, Mapping[int, Number]], *, watch: bool = False) -> None:
        self.right = {call: dict(numbers) for call, numbers in right.items()}
        self.seen: dict[int, list[Any]] | None = {} if watch else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Starts to watch."""
        mode = Watch(module, self.right, self.seen)
        mode.__enter__()
        _active().append(mode)


def end(module: nn.Module, args: Any, output: Any) -> None:
    """The hook after a module's forward, which runs also when that fails: its watch ends."""
    if _active() and _active()[-1].module is module:
        _active().pop().__exit__(None, None, None)


_LOCAL = threading.local()  # watches that have begun in this thread


def _active() -> list[Watch]:
    if not hasattr(_LOCAL, "watches"):
        _LOCAL.watches = []
    watches: list[Watch] = _LOCAL.watches
    return watches


def set_numbers_(model: nn.Module, numbers: Mapping[str, Mapping[int, Mapping[int, Number]]]) -> None:
    """Lets the named modules of `model` pass `numbers` in their calls, besides those that they already put right.

    Raises:
        AttributeError: if `model` lacks one of the modules.
    """
    for name, calls in numbers.items():
        module = model.get_submodule(name)
        hook = next(_hooks(module), None)
        if hook is None:
            hook = Begin({})
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(end, always_call=True)
        for call, right in calls.items():
            row = hook.right.setdefault(call, {})
            for position, new in right.items():
                row[position] = _after(row.get(position), new)


def numbers_in(model: nn.Module) -> Numbers:
    """Returns the numbers that the modules of `model` put right."""
    found = ((name, hook) for name, module in model.named_modules() for hook in _hooks(module))
    return {name: {call: dict(right) for call, right in hook.right.items()} for name, hook in found if hook.right}


def watch_(model: nn.Module, names: Sequence[str]) -> dict[str, dict[int, list[Any]]]:
    """Notes, from now on, the numbers that the code of the named modules passes: module -> call -> numbers."""
    seen: dict[str, dict[int, list[Any]]] = {}
    set_numbers_(model, {name: {} for name in names})
    for name in names:
        hook = next(_hooks(model.get_submodule(name)))
        hook.seen = seen.setdefault(name, {})
    return seen


def _hooks(module: nn.Module) -> Iterator[Begin]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Begin))


def _after(old: Number | None, new: Number) -> Number:
    """Returns one number for `old` and then `new`."""
    if isinstance(new, int) or old is None:
        return new
    if isinstance(old, int):
        return old * new[0] // new[1]
    return old[0] * new[0], old[1] * new[1]
