"""Numbers in a module's forward code: `view(n, 4, 8)`, `split([4, 12])`, `x[:, :16]`, and how to put others in place.

Sizes that are written into code, or kept in attributes, do not follow tensors that became smaller. Such a number is
identified by its module, by the place of the call in the code (file, function, line, column, operation), and by its
position among the numbers of that call. Example: `view(n, 4, 8)` in `Block.forward` has the numbers n (position 0),
4 (position 1) and 8 (position 2). A module with corrections watches its own calls as it runs and passes the right
numbers; code and weights are as the user made them. Code may take another path each time: places that it does not
reach are left alone. A place that a loop reaches several times with different numbers is counted in addition.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator
from torch import SymInt, Tensor, nn
from torch.overrides import TorchFunctionMode

Indices = tuple[Literal["index"], int, tuple[int, ...]]
"""What stands in the place of a tensor of indices: these, along one of its dimensions."""
Number = int | tuple[int, int] | Indices
"""What stands in the place of a number: another one, or (new, old): as many times `new` as it was times `old`."""


def _as_text(calls: Any) -> Any:
    return {str(call): row for call, row in calls.items()} if isinstance(calls, dict) else calls


Calls = Annotated[dict[str, dict[int, Number]], BeforeValidator(_as_text)]
Numbers = dict[str, Calls]
"""Module -> place of the call -> position in the call -> number.

A place is `file:function+line:column:operation`, with those of the callers before it, and `#2` after it where only the
third call at that place in one forward is meant. Files of older versions have the index of the call in its place ("3"
is the fourth call of a function of `COUNTED` in one forward); they are still read.
"""

COUNTED: dict[Callable[..., Any], tuple[str, ...]] = {
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
"""Functions whose numbers may be sizes of channel axes, with the names of their arguments in order.

Older files count the calls of exactly these: add others to `SIZED`, never here.
"""

WRITTEN_AT = {
    "index_put": ("indices", "values"),
    "index_copy": ("dim", "index", "source"),
    "index_add": ("dim", "index", "source"),
    "index_reduce": ("dim", "index", "source", "reduce"),
    "index_fill": ("dim", "index", "value"),
    "scatter": ("dim", "index", "src"),
    "scatter_add": ("dim", "index", "src"),
    "scatter_reduce": ("dim", "index", "src", "reduce"),
}
"""Operations that write to places which a tensor of indices names, and their arguments."""

WRITES: dict[Callable[..., Any], tuple[str, ...]] = {
    function: arguments
    for name, arguments in WRITTEN_AT.items()
    for function in (getattr(Tensor, name), getattr(Tensor, f"{name}_"), getattr(torch, name))
}
"""The same by function: each is a method, a method that writes in place, and a function of torch."""

CONVOLVED = ("weight", "bias", "stride", "padding", "dilation", "groups")

SIZED: dict[Callable[..., Any], tuple[str, ...]] = {
    **COUNTED,
    **WRITES,
    Tensor.broadcast_to: ("size",),
    torch.broadcast_to: ("size",),
    F.layer_norm: ("normalized_shape",),
    torch.layer_norm: ("normalized_shape",),
    F.rms_norm: ("normalized_shape",),
    torch.rms_norm: ("normalized_shape",),
    Tensor.tensor_split: ("indices_or_sections", "dim"),
    torch.tensor_split: ("indices_or_sections", "dim"),
    Tensor.hsplit: ("indices_or_sections",),
    torch.hsplit: ("indices_or_sections",),
    Tensor.vsplit: ("indices_or_sections",),
    torch.vsplit: ("indices_or_sections",),
    Tensor.dsplit: ("indices_or_sections",),
    torch.dsplit: ("indices_or_sections",),
    torch.unsafe_split: ("split_size", "dim"),
    Tensor.unsafe_split: ("split_size", "dim"),
    F.conv1d: CONVOLVED,
    F.conv2d: CONVOLVED,
    F.conv3d: CONVOLVED,
    torch.empty: ("size",),
    Tensor.new_empty: ("size",),
}
"""All functions whose calls are noted and put right."""

SHAPED = tuple(
    function for function, names in SIZED.items() if {"size", "shape", "sizes"} & set(names)
)
"""Functions to which -1 says "what is left"."""
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def numbers_of(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[Any]:
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


def indices_of(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[Any]:
    """Returns the tensors (or lists) of indices in the arguments of a call, in order; not those of what is written.

    >>> indices_of(Tensor.__setitem__, (torch.zeros(8), torch.tensor([1, 2]), 0.0), {})
    [tensor([1, 2])]
    """
    found: list[Any] = []

    def see(index: Any) -> Any:
        found.append(index)
        return index

    _map_indices(function, args, options, see)
    return found


def with_numbers(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    right: Mapping[int, Number],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with the numbers at some positions replaced; -1 ("what is left") stays.

    Position -1 is the first tensor of indices among the arguments, -2 the second.

    >>> with_numbers(Tensor.reshape, (torch.zeros(12), (2, 8)), {}, {1: 6})[0][1]
    (2, 6)
    """
    at = -1

    def put(number: Any) -> Any:
        nonlocal at
        at += 1
        new = right.get(at)
        if new is None or (isinstance(number, int) and number == -1 and function in SHAPED):
            return number
        return number * new[0] // new[1] if isinstance(new, tuple | list) else new

    first, rest, named = _arranged(function, args, options)
    first, rest, named = _map((first, rest, named), put)
    args, options = (*first, *rest), dict(named)
    if not any(position < 0 for position in right):
        return args, options
    count = 0

    def place(index: Any) -> Any:
        nonlocal count
        count += 1
        new = right.get(-count)
        return index if new is None else _spread(index, new)

    return _map_indices(function, args, options, place)


def _spread(index: Any, new: Any) -> Tensor:
    """Returns the new indices in the shape of the old ones, which are the same for all but one dimension."""
    _, dim, places = new
    device = index.device if isinstance(index, Tensor) else None
    line = torch.tensor(places, dtype=torch.int64, device=device)
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.dim() < 2:
        return line
    shape = list(index.shape)
    shape[dim] = len(places)
    return line.view([-1 if d == dim else 1 for d in range(index.dim())]).expand(shape)


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


def _map_indices(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any], see: Any
) -> Any:
    """Maps the argument that holds indices: the second, or the one that is called `index` or `indices`."""
    names = SIZED[function]
    at = next((i for i, name in enumerate(names, 1) if name in ("index", "indices")), 1)
    if function not in INDEXING and function not in WRITES:
        return tuple(args), dict(options)
    changed = list(args)
    if len(changed) > at:
        changed[at] = _map_index(changed[at], see)
    named = {k: _map_index(v, see) if k in ("index", "indices") else v for k, v in options.items()}
    return tuple(changed), named


def _map_index(index: Any, see: Callable[[Any], Any]) -> Any:
    if isinstance(index, Tensor):
        return see(index)
    if isinstance(index, list) and index and all(isinstance(i, int) for i in index):
        return see(index)
    if isinstance(index, tuple | list):
        items = [_map_index(item, see) for item in index]
        return items if isinstance(index, list) else tuple(items)
    return index


@dataclass(frozen=True)
class Caller:
    """Who makes a call of a torch function: the module whose method does it, and where in the code."""

    module: nn.Module
    place: str


_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")


def caller(function: Callable[..., Any]) -> Caller | None:
    """Returns the module whose method makes the present call of `function`, and the place; None outside modules.

    The place names the call and, where helpers make it, the calls that lead to it from the module's own code.
    """
    frame: FrameType | None = sys._getframe(1)
    module: nn.Module | None = None
    parts: list[str] = []
    inner: FrameType | None = (
        None  # a comprehension, which newer versions of Python run within its function
    )
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            if module is not None and owner is not module:
                break
            module = owner
        name = str(frame.f_globals.get("__name__", ""))
        if module is not None and name == nn.Module.__module__:  # which called the module's forward
            break
        ours = name == __name__ or name.startswith("fedpress.compress.")
        if not ours and (
            owner is module is not None or not name.startswith(("torch.", "contextlib"))
        ):
            if frame.f_code.co_name in _COMPREHENSIONS:
                inner = inner or frame
            else:
                parts.append(_part(frame.f_code, inner or frame))
                inner = None
        frame = frame.f_back
    if module is None:
        return None
    return Caller(module, " ".join([*reversed(parts), getattr(function, "__name__", "call")]))


_PARTS: dict[tuple[CodeType, CodeType, int], str] = {}


def _part(code: CodeType, at: FrameType) -> str:
    """Names the function of `code`, and the line within it and the column where the call in `at` ends."""
    key = code, at.f_code, at.f_lasti
    if key not in _PARTS:
        _, line, _, column = list(at.f_code.co_positions())[at.f_lasti // 2]
        # Lines count from the function's first, so that changes above it in the file do no harm.
        offset = (line or at.f_lineno) - code.co_firstlineno
        _PARTS[key] = (
            f"{os.path.basename(code.co_filename)}:{code.co_qualname}+{offset}:{column or 0}"
        )
    return _PARTS[key]


def has_place(module: nn.Module, place: str) -> bool:
    """Says whether the code of the module's class still has a call at `place`; True where that cannot be known."""
    first, *_ = place.split(" ")
    named, plus, rest = first.rpartition("+")
    if not plus:  # the index of a call, of an older file
        return True
    offset, _, column = rest.partition(":")
    known = [
        code
        for kind in type(module).__mro__
        for value in vars(kind).values()
        for code in _codes(
            getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        )
        if f"{os.path.basename(code.co_filename)}:{code.co_qualname}" == named
    ]
    if not known or column == "0":
        return True
    return any((int(offset), int(column)) in _ends(code) for code in known)


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    """Yields the code of a function and of those that are defined in it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _codes(constant)


def _ends(code: CodeType) -> set[tuple[int, int]]:
    """Returns the line, from the function's first on, and the column where each of its operations ends."""
    first = code.co_firstlineno
    inner = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name in _COMPREHENSIONS]
    return {
        (line - first, column)
        for each in (code, *inner)
        for _, line, _, column in each.co_positions()
        if line is not None and column is not None
    }


class Watch(TorchFunctionMode):
    """Passes the right numbers to the calls of one module while it is active, and may note what the code passed."""

    def __init__(
        self,
        module: nn.Module,
        right: Mapping[str, Mapping[int, Number]],
        seen: dict[str, list[Any]] | None,
    ):
        super().__init__()
        self.module, self.right, self.seen = module, right, seen
        self.count, self.times = 0, Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, with other numbers where this call has some."""
        options = kwargs or {}
        by = caller(func) if func in SIZED else None
        if by is None or by.module is not self.module:
            return func(*args, **options)
        place = f"{by.place}#{self.times[by.place]}"
        self.times[by.place] += 1
        if func in COUNTED:
            args, options = self._put_right(func, args, options, str(self.count))
            self.count += 1
        if self.seen is not None:
            self.seen[place] = numbers_of(func, args, options)
        args, options = self._put_right(
            func, args, options, place if place in self.right else by.place
        )
        return func(*args, **options)

    def _put_right(self, func: Any, args: Any, options: Any, key: str) -> Any:
        right = self.right.get(key)
        return with_numbers(func, args, options, right) if right else (args, options)


class Begin:
    """The hook before a module's forward: a new `Watch` with its table of right numbers."""

    def __init__(self, right: Mapping[str, Mapping[int, Number]], *, watch: bool = False) -> None:
        self.right = {call: dict(numbers) for call, numbers in right.items()}
        self.seen: dict[str, list[Any]] | None = {} if watch else None

    def __call__(self, module: nn.Module, _: Any) -> None:
        """Starts to watch."""
        mode = Watch(module, self.right, self.seen)
        mode.__enter__()
        _active().append(mode)

    def put_(self, call: str, new: Mapping[int, Number]) -> None:
        """Corrects a call further: what is said of all calls at a place holds for each of them by number too."""
        base, _, _ = call.partition("#")
        if call != base:
            self.right.setdefault(call, dict(self.right.get(base, {})))
        for key in (call, *(k for k in self.right if call == base and k.startswith(base + "#"))):
            row = self.right.setdefault(key, {})
            for position, number in new.items():
                row[position] = _after(row.get(position), number)


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


def set_numbers_(
    model: nn.Module, numbers: Mapping[str, Mapping[Any, Mapping[int, Number]]]
) -> None:
    """Lets the named modules of `model` pass `numbers` in their calls, besides those that they already put right.

    Raises:
        AttributeError: if `model` lacks one of the modules, or the code of one no longer has such a call.
    """
    for name, calls in numbers.items():
        module = model.get_submodule(name)
        gone = next((call for call in calls if not has_place(module, str(call))), None)
        if gone is not None:
            where = f"'{name}'" if name else "the model itself"
            raise AttributeError(
                f"the code of {where} has changed: there is no call at {gone.split(' ')[0]} any more"
            )
        hook = next(_hooks(module), None)
        if hook is None:
            hook = Begin({})
            module.register_forward_pre_hook(hook)
            module.register_forward_hook(end, always_call=True)
        for call, right in calls.items():
            hook.put_(str(call), right)


def numbers_in(model: nn.Module) -> Numbers:
    """Returns the numbers that the modules of `model` put right."""
    found = ((name, hook) for name, module in model.named_modules() for hook in _hooks(module))
    return {
        name: {call: dict(right) for call, right in hook.right.items()}
        for name, hook in found
        if hook.right
    }


def watch_(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Notes, from now on, the numbers that the code of the named modules passes: module -> `place#n` -> numbers."""
    seen: dict[str, dict[str, list[Any]]] = {}
    set_numbers_(model, {name: {} for name in names})
    for name in names:
        hook = next(_hooks(model.get_submodule(name)))
        hook.seen = seen.setdefault(name, {})
    return seen


def _hooks(module: nn.Module) -> Iterator[Begin]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Begin))


def _after(old: Number | None, new: Number) -> Number:
    """Returns one number for `old` and then `new`."""
    if isinstance(new, int) or old is None or len(new) == 3:
        return new
    if isinstance(old, int):
        return old * new[0] // new[1]
    assert len(old) == 2, "what is an index stays one"
    return old[0] * new[0], old[1] * new[1]
