"""Limits the sizes that an untrusted file declares, before memory is allocated.

A file of a few bytes may describe a network of terabytes. Each limit can be raised by an
environment variable, such as `FEDPRESS_MAX_LAYERS=20000`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fedpress.core.inputs import Inputs, arguments
from fedpress.errors import ModelError, RecipeError


class AboveLimit(ModelError):
    """A declared size is above its limit."""


@dataclass(frozen=True)
class Limit:
    """The limit of one size.

    Attributes:
        variable: the environment variable that changes the limit.
        default: the limit without the variable.
        what: description of the size for errors, such as "pixels of one image".
    """

    variable: str
    default: int
    what: str


LIMITS = {
    "values": Limit("FEDPRESS_MAX_VALUES", 2**31, "values of a network that a file describes"),
    "layers": Limit("FEDPRESS_MAX_LAYERS", 10_000, "modules of a network, or entries of one list"),
    "recurrent": Limit("FEDPRESS_MAX_RECURRENT", 100, "layers inside one recurrent layer"),
    "depth": Limit("FEDPRESS_MAX_DEPTH", 32, "lists and tables inside each other"),
    "input": Limit("FEDPRESS_MAX_INPUT", 2**27, "values of one example that a file declares"),
    "activations": Limit(
        "FEDPRESS_MAX_ACTIVATIONS",
        2**26,
        "values of one tensor inside a network that runs on one example",
    ),
    "pixels": Limit("FEDPRESS_MAX_PIXELS", 2**26, "pixels of one image"),
}
"""Name of a size -> its limit.

2^31 values are 8 GiB of float32; 2^26 pixels are an image of 8192 x 8192, 201 MB in RGB.
"""


# Eight parameters count as one module, because an LSTM of a thousand layers is a single module.
PARAMETERS = 8
# Names of arguments that usually say how many layers a network has.
COUNTS = {"num_layers", "n_layers", "layers", "depth", "num_blocks", "blocks"}


def all_limits() -> tuple[int, ...]:
    """Returns all limits with the present environment variables, in the order of `LIMITS`.

    Raises:
        RecipeError: if a variable holds no integer above 0.
    """
    return tuple(limit(name) for name in LIMITS)


def limit(name: str) -> int:
    """Returns a limit: the value of its environment variable, or its default.

    Raises:
        RecipeError: if the variable holds no integer above 0.

    >>> limit("depth")
    32
    """
    row = LIMITS[name]
    text = os.environ.get(row.variable)
    if text is None:
        return row.default
    # 18 digits always fit a 64-bit integer, and int() of millions of digits would be slow.
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < 1:
        raise RecipeError(
            f"got {text[:40]!r}, expected a whole number above 0, such as {row.default}",
            place=row.variable,
        )
    return int(text)


class Excess(NamedTuple):
    """A size above its limit, as the problem and the cure of an error."""

    problem: str
    cure: str


def above(name: str, got: int, *, counting: bool = False) -> Excess | None:
    """Returns problem and cure if a size is above its limit; else None.

    Args:
        name: key of `LIMITS`.
        got: the size.
        counting: whether `got` is a running count, whose final value is unknown. The cure then
            advises at least twice the limit.

    >>> above("depth", 3)
    """
    most = limit(name)
    if got <= most:
        return None
    row = LIMITS[name]
    size, enough = f"{got:,}", str(got)
    if counting:
        size, enough = f"at least {got:,}", f"{max(got, 2 * most)} or more"
    return Excess(
        f"{size} {row.what}, and the limit is {most:,}",
        f"if you trust the file, set {row.variable}={enough}",
    )


def check(name: str, got: int, place: str, *, counting: bool = False) -> None:
    """Checks that a size is not above its limit; see `above` for the arguments.

    Raises:
        ModelError: if the size is above its limit; it names `place` and the environment variable.
    """
    excess = above(name, got, counting=counting)
    if excess is not None:
        raise AboveLimit(excess.problem, place=place, cure=excess.cure)


def depth(tree: Any) -> int:
    """Returns how deep lists and dictionaries are nested.

    >>> depth({"a": [1, [2]]})
    3
    """
    # Not recursive: a deeply nested file would exceed Python's recursion limit.
    deepest, todo = 0, [(tree, 1)]
    while todo:
        node, at = todo.pop()
        if not isinstance(node, dict | list | tuple):
            continue
        deepest = max(deepest, at)
        items = node.values() if isinstance(node, dict) else node
        todo.extend((item, at + 1) for item in items)
    return deepest


def check_tree(tree: Any, place: str, *, lists: bool = True) -> None:
    """Checks a description from a file: its depth, its integers, and the lengths of its lists.

    Integers that count layers, such as `num_layers`, have the limit "layers", others "values".

    Args:
        tree: lists, dictionaries and values.
        place: name of the description in errors.
        lists: whether the lengths of lists and dictionaries are limited.

    Raises:
        ModelError: if something is above its limit.
    """
    check("depth", depth(tree), place)
    todo = [(tree, place)]
    while todo:
        node, at = todo.pop()
        if isinstance(node, dict):
            if lists:
                check("layers", len(node), at)
            # A million tiny layers need little memory, but take long to build.
            for key in node.keys() & COUNTS:
                if isinstance(node[key], int):
                    check("layers", node[key], f"{at}.{key}")
            todo.extend((value, f"{at}.{str(key)[:40]}") for key, value in node.items())
        elif isinstance(node, list | tuple):
            if lists:
                check("layers", len(node), at)
            todo.extend((value, at) for value in node)
        elif isinstance(node, int):
            check("values", abs(node), at)


class _ValueLimit(TorchDispatchMode):
    """While active, raises ModelError once new tensors together have more values than the limit."""

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.made = place, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An operation without tensor arguments makes a new tensor, such as empty([3, 4]). The list
        # argument is its size.
        if not any(isinstance(arg, Tensor) for arg in args):
            sizes = [prod(arg) for arg in args if _is_size(arg)]
            self.made += max(sizes, default=0)
            check("values", self.made, self.place, counting=True)
        return func(*args, **(kwargs or {}))


def _is_size(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(n, int) for n in value)


class _ActivationLimit(TorchDispatchMode):
    """While active, raises ModelError if the result of an operation is above the limit.

    It is used on the meta device, where results have shapes but no memory.
    """

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                check("activations", value.numel(), self.place)
        return out


def check_activations(model: nn.Module, example: Inputs, place: str) -> None:
    """Checks the sizes of all activations of `model` on `example`, without computing them.

    A network with few parameters can still fill the memory if it has, for instance, a large padding
    or output size. A network that cannot run on the example passes this check, because it fails
    when it is run.

    Raises:
        ModelError: if a tensor has more values than the limit.
    """
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    shapes = {name: value.detach().to("meta") for name, value in tensors}
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), _ActivationLimit(place):
            torch.func.functional_call(model.eval(), shapes, *arguments(example.to("meta")))
    # Before `except Exception`, which would catch it too.
    except AboveLimit:
        raise
    # For instance shapes that do not fit. The user sees such an error when the network is run.
    except Exception:
        return
    finally:
        # `model.train()` would instead unfreeze batch norms that are frozen on purpose.
        for module, was in training.items():
            module.training = was


@contextmanager
def limited_building(place: str, *, meta: bool = False) -> Iterator[None]:
    """Limits the values and modules of networks that are built inside the `with` block.

    Args:
        place: name of the network in errors.
        meta: whether the networks are built on the meta device. Tensors take no memory there, so
            only the number of modules is limited.

    Raises:
        ModelError: in the block, before a tensor is made, or a module or parameter is registered,
            that exceeds a limit.
    """
    modules = parameters = 0

    def count_module(module: nn.Module, name: str, child: Any) -> None:
        nonlocal modules
        modules += 1
        check("layers", modules, place, counting=True)

    def count_parameter(module: nn.Module, name: str, value: Any) -> None:
        nonlocal parameters
        parameters += 1
        check("layers", parameters // PARAMETERS, place, counting=True)

    handles = (
        register_module_module_registration_hook(count_module),
        register_module_parameter_registration_hook(count_parameter),
    )
    try:
        with nullcontext() if meta else _ValueLimit(place):
            yield
    finally:
        for handle in handles:
            handle.remove()


def count_values(build: Any, arguments: dict[str, Any]) -> int:
    """Returns the number of parameter and buffer values of the network `build(**arguments)`.

    The network is built on the meta device, so the values take no memory.

    Raises:
        ModelError: if it has more modules than the limit.
    """
    with limited_building("spec.arguments", meta=True), torch.device("meta"):
        model = build(**arguments)
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))
