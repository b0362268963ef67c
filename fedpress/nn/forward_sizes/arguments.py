"""Reads the numbers among the arguments of a torch call, and replaces them by corrected numbers.

Example: `x.view(n, 4, 8)` has the numbers n, 4 and 8. After pruning, the 8 may have to become 6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator
from torch import SymInt, Tensor

Indices = tuple[Literal["index"], int, tuple[int, ...]]
"""The correction of a tensor of indices: ("index", dimension, new indices along it)."""
Number = int | tuple[int, int] | Indices
"""The correction of a number: the new number, or (new, old) for number * new / old.

The pair is for multiples, such as `n * heads`, whose other factor may change from call to call.
"""


def _keys_as_text(calls: Any) -> Any:
    """Converts the names of calls to strings: files of older versions have integers."""
    if not isinstance(calls, dict):
        return calls
    return {str(call): row for call, row in calls.items()}


Calls = Annotated[dict[str, dict[int, Number]], BeforeValidator(_keys_as_text)]
"""Place of the call -> position in the call -> correction, for one module (see `Numbers`)."""
Numbers = dict[str, Calls]
"""Module -> place of the call -> position in the call -> correction.

A place is `file:function+line:column operation`; if helper functions make the call, their places
come before it. A place ending in `#2` means only the third call there in one forward. Files of
older versions have the index of the call instead: "3" is the fourth call of any function of
`COUNTED_IN_OLD_FILES` in one forward.
"""

COUNTED_IN_OLD_FILES: dict[Callable[..., Any], tuple[str, ...]] = {
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

Older files count the calls of exactly these functions: add others to `SIZED`, never here.
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
"""Operations that write to places given by a tensor of indices -> names of their arguments."""

WRITES: dict[Callable[..., Any], tuple[str, ...]] = {}
"""Each function of `WRITTEN_AT` -> names of its arguments.

For "scatter" these are `Tensor.scatter`, `Tensor.scatter_` and `torch.scatter`.
"""
for _name, _arguments in WRITTEN_AT.items():
    WRITES[getattr(Tensor, _name)] = _arguments
    WRITES[getattr(Tensor, f"{_name}_")] = _arguments
    WRITES[getattr(torch, _name)] = _arguments

CONVOLUTION = ("weight", "bias", "stride", "padding", "dilation", "groups")
"""Names of the arguments of a convolution after its input, in order."""

SIZED: dict[Callable[..., Any], tuple[str, ...]] = {
    **COUNTED_IN_OLD_FILES,
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
    F.conv1d: CONVOLUTION,
    F.conv2d: CONVOLUTION,
    F.conv3d: CONVOLUTION,
    torch.empty: ("size",),
    Tensor.new_empty: ("size",),
}
"""All functions whose calls are recorded and corrected -> names of their arguments, in order."""

SHAPED = tuple(
    function for function, names in SIZED.items() if {"size", "shape", "sizes"} & set(names)
)
"""Functions with sizes as arguments. Their sizes of -1 are not numbers: torch replaces them."""
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
"""The functions behind `x[...]` and `x[...] = y`."""
INDEX_NAMES = ("index", "indices")
"""Names of arguments that hold indices."""


def numbers_of(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[Any]:
    """Returns the numbers among the arguments of a call, in order.

    A slice has three numbers: start, stop and step. They are None if the code does not give them.

    >>> numbers_of(Tensor.reshape, (torch.zeros(8), (2, 4)), {})
    [2, 4]
    >>> numbers_of(Tensor.__getitem__, (torch.zeros(2, 8), (0, slice(4, None))), {})
    [0, 4, None, None]
    """
    found: list[Any] = []

    def visit(number: Any) -> Any:
        found.append(number)
        return number

    _map_numbers(_arranged(function, args, options), visit)
    return found


def indices_of(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[Any]:
    """Returns the tensors or lists of indices among the arguments of a call, in order.

    >>> indices_of(Tensor.__setitem__, (torch.zeros(8), torch.tensor([1, 2]), 0.0), {})
    [tensor([1, 2])]
    """
    found: list[Any] = []

    def visit(index: Any) -> Any:
        found.append(index)
        return index

    _map_indices(function, args, options, visit)
    return found


def with_numbers(
    function: Callable[..., Any],
    args: Sequence[Any],
    options: Mapping[str, Any],
    corrections: Mapping[int, Number],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with the numbers at some positions corrected.

    Position -1 means the first tensor or list of indices among the arguments, -2 the second. A size
    of -1 is not changed, because torch replaces it: by a computed size or by the old size.

    >>> with_numbers(Tensor.reshape, (torch.zeros(12), (2, 8)), {}, {1: 6})[0][1]
    (2, 6)
    """
    position = -1

    def corrected(number: Any) -> Any:
        nonlocal position
        position += 1
        new = corrections.get(position)
        is_computed = isinstance(number, int) and number == -1 and function in SHAPED
        if new is None or is_computed:
            return number
        if isinstance(new, tuple | list):
            return number * new[0] // new[1]
        return new

    arranged = _arranged(function, args, options)
    tensors, rest, named = _map_numbers(arranged, corrected)
    args, options = (*tensors, *rest), dict(named)
    # Most calls have no correction of indices: then the search for tensors of indices is skipped.
    if not any(number < 0 for number in corrections):
        return args, options

    count = 0

    def exchanged(index: Any) -> Any:
        nonlocal count
        count += 1
        new = corrections.get(-count)
        return index if new is None else _in_shape_of(index, new)

    return _map_indices(function, args, options, exchanged)


def _in_shape_of(index: Any, new: Any) -> Tensor:
    """Returns the new indices in the shape of the old ones, except for one dimension.

    Args:
        index: the old tensor or list of indices.
        new: ("index", dimension, new indices along this dimension).
    """
    _, dim, places = new
    device = index.device if isinstance(index, Tensor) else None
    line = torch.tensor(places, dtype=torch.int64, device=device)
    # A list, a vector or a mask is replaced by a vector of indices.
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.dim() < 2:
        return line
    shape = list(index.shape)
    shape[dim] = len(places)
    return line.view([-1 if d == dim else 1 for d in range(index.dim())]).expand(shape)


def _arranged(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """Splits arguments into the tensor, the other positional arguments, and the named arguments.

    Named arguments are sorted as in the signature, so that a number has the same position whether
    its argument is named or not.
    """
    # The first argument of a method is the tensor itself, which has no numbers.
    tensors = 1 if args and isinstance(args[0], Tensor) else 0
    # A name that is not listed comes last.
    order = {name: i for i, name in enumerate(SIZED[function])}
    named = sorted(options.items(), key=lambda item: order.get(item[0], len(order)))
    return tuple(args[:tensors]), tuple(args[tensors:]), tuple(named)


def _map_numbers(value: Any, visit: Callable[[Any], Any]) -> Any:
    """Replaces every number in nested arguments by the result of `visit`, in order."""
    # A slice always counts as three numbers, so that positions do not depend on how it is written.
    if isinstance(value, slice):
        return slice(visit(value.start), visit(value.stop), visit(value.step))
    if isinstance(value, tuple | list):
        items = [_map_numbers(item, visit) for item in value]
        return items if isinstance(value, list) else tuple(items)
    # In a capture with dynamic shapes a size may be a symbol. A bool is an int in Python.
    if isinstance(value, int | SymInt) and not isinstance(value, bool):
        return visit(value)
    return value


def _map_indices(
    function: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any], visit: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replaces tensors of indices by the result of `visit`, in the argument that holds indices.

    This is the argument named `index` or `indices`. In `x[...]` it is the second argument.
    """
    # Other functions have no argument that holds indices.
    if function not in INDEXING and function not in WRITES:
        return tuple(args), dict(options)
    position = 1
    for i, name in enumerate(SIZED[function], start=1):  # the tensor itself is argument 0
        if name in INDEX_NAMES:
            position = i
            break
    # The user may have passed the indices by position or by name.
    positional = list(args)
    if len(positional) > position:
        positional[position] = _map_index(positional[position], visit)
    named = dict(options)
    for name in INDEX_NAMES:
        if name in named:
            named[name] = _map_index(named[name], visit)
    return tuple(positional), named


def _map_index(index: Any, visit: Callable[[Any], Any]) -> Any:
    """Replaces every tensor or list of indices in an index by the result of `visit`."""
    if isinstance(index, Tensor):
        return visit(index)
    # A list of numbers indexes like a tensor.
    if isinstance(index, list) and index and all(isinstance(i, int) for i in index):
        return visit(index)
    if isinstance(index, tuple | list):
        items = [_map_index(item, visit) for item in index]
        return items if isinstance(index, list) else tuple(items)
    return index
