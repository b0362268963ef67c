"""How much a file may ask for: declared sizes are compared with a limit before anything of that size is made."""

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
    """One row: the environment variable that changes the limit, its default, and what it counts."""

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
"""2^31 values are 8 GiB of float32; 2^26 pixels are an image of 8192 x 8192, 201 MB in RGB."""


PARAMETERS = 8
"""So many parameters count as a module at least: an LSTM of a thousand layers is one module, but not small."""
COUNTS = {"num_layers", "n_layers", "layers", "depth", "num_blocks", "blocks"}
"""Arguments that say how many layers there are."""


def limit(name: str) -> int:
    """Returns the limit of this name, as its environment variable says it if that is set.

    Raises:
        RecipeError: if the variable holds no whole number above 0.

    >>> limit("depth")
    32
    """
    row = LIMITS[name]
    text = os.environ.get(row.variable)
    if text is None:
        return row.default
    if not (text.isascii() and text.isdecimal()) or len(text) > 18 or int(text) < 1:
        raise RecipeError(
            f"got {text[:40]!r}, expected a whole number above 0, such as {row.default}",
            place=row.variable,
        )
    return int(text)


class Above(NamedTuple):
    """What is above a limit, and how that is raised."""

    problem: str
    cure: str


def above(name: str, got: int, *, counting: bool = False) -> Above | None:
    """Says that `got` is above a limit, and how to raise that; None if it is not.

    `counting` says that the end is not known yet: then the cure is twice the limit, or more.

    >>> above("depth", 3)
    """
    most = limit(name)
    if got <= most:
        return None
    row = LIMITS[name]
    enough, least = (f"{max(got, 2 * most)} or more", "at least ") if counting else (str(got), "")
    return Above(
        f"{least}{got:,} {row.what}, and the limit is {most:,}",
        f"if you trust the file, set {row.variable}={enough}",
    )


def check(name: str, got: int, place: str, *, counting: bool = False) -> None:
    """Compares a declared size with its limit; see `above`.

    Raises:
        ModelError: if it is above, naming `place` and the variable to raise.
    """
    if said := above(name, got, counting=counting):
        raise AboveLimit(said.problem, place=place, cure=said.cure)


def depth(tree: Any) -> int:
    """Returns how deep lists and tables lie inside each other, without recursion.

    >>> depth({"a": [1, [2]]})
    3
    """
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
    """Compares what stands in a description with the limits: depth, every whole number, and how long `lists` are.

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
            for key in (
                node.keys() & COUNTS
            ):  # a loop over them takes its time even if each is small
                if isinstance(node[key], int):
                    check("layers", node[key], f"{at}.{key}")
            todo.extend((value, f"{at}.{str(key)[:40]}") for key, value in node.items())
        elif isinstance(node, list | tuple):
            if lists:
                check("layers", len(node), at)
            todo.extend((value, at) for value in node)
        elif isinstance(node, int):
            check("values", abs(node), at)


class _Budget(TorchDispatchMode):
    """Refuses an operation that would make a tensor of more values than are left."""

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place, self.made = place, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(
            isinstance(arg, Tensor) for arg in args
        ):  # it makes something new, of a size that it is told
            sizes = [
                arg
                for arg in args
                if isinstance(arg, list | tuple) and all(isinstance(n, int) for n in arg)
            ]
            self.made += max((prod(size) for size in sizes), default=0)
            check("values", self.made, self.place, counting=True)
        return func(*args, **(kwargs or {}))


class _Running(TorchDispatchMode):
    """Refuses an operation that gives a tensor of more values than the limit; on the meta device none is made."""

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                check("activations", value.numel(), self.place)
        return out


def check_running(model: nn.Module, example: Inputs, place: str) -> None:
    """Looks how large the tensors become when `model` runs on `example`, by their shapes alone.

    A padding, a stride or a target size of a layer may make a small network fill the memory. A network that does not
    take the example passes: it does not run at all.

    Raises:
        ModelError: if one has more values than the limit.
    """
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    shapes = {name: value.detach().to("meta") for name, value in tensors}
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), _Running(place):
            torch.func.functional_call(model.eval(), shapes, *arguments(example.to("meta")))
    except AboveLimit:
        raise
    except Exception:  # whatever torch says of shapes: whoever runs the network is told
        return
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def building(place: str, *, meta: bool = False) -> Iterator[None]:
    """Watches the building of a network: the values of all new tensors together, and the number of modules.

    On the `meta` device the number of modules alone: tensors take no memory there, and are counted at the end.

    Raises:
        ModelError: in the block, before the tensor is made that would pass the limit.
    """
    count = own = 0

    def see(module: nn.Module, name: str, child: Any) -> None:
        nonlocal count
        count += 1
        check("layers", count, place, counting=True)

    def see_own(module: nn.Module, name: str, value: Any) -> None:
        nonlocal own
        own += 1
        check("layers", own // PARAMETERS, place, counting=True)

    handles = (
        register_module_module_registration_hook(see),
        register_module_parameter_registration_hook(see_own),
    )
    try:
        with nullcontext() if meta else _Budget(place):
            yield
    finally:
        for handle in handles:
            handle.remove()


def declared(build: Any, arguments: dict[str, Any]) -> int:
    """Returns the number of values of the network that `build(**arguments)` would make, without making them.

    Raises:
        ModelError: if that has more modules than the limit says, before it is complete.
    """
    with building("spec.arguments", meta=True), torch.device("meta"):
        model = build(**arguments)
    return sum(t.numel() for t in (*model.parameters(), *model.buffers()))
