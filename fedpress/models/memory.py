"""Names for modules of this process in recipes, and architectures that files can name instead."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedpress.core.inputs import Inputs, call
from fedpress.errors import ModelError
from fedpress.models import layer_list
from fedpress.nn.resize import copied

# The architecture of a module in memory. Its argument is the name that `holding` gives.
HELD = "fedpress.models.memory:held"
# Prefix of a teacher that is such a module.
TEACHER = "memory:"


@dataclass(frozen=True)
class Named:
    """An architecture and its arguments, from which another process can build a network."""

    architecture: str
    arguments: dict[str, JsonValue]


@dataclass(frozen=True, eq=False)
class _Held:
    module: nn.Module
    named: Named | None


_held: dict[str, _Held] = {}
_numbers = count(1)
_specs: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def holding(module: nn.Module, named: Named | None = None) -> Iterator[str]:
    """Registers a module, and yields the name under which `held` copies it inside of the block.

    Args:
        module: it is not changed.
        named: what files name in its place (see `find_name`). None: files of the model cannot be
            opened by another process.
    """
    name = str(next(_numbers))
    _held[name] = _Held(module, named)
    try:
        yield name
    finally:
        del _held[name]


def held(name: str) -> nn.Module:
    """Returns a copy of the module that `holding` has registered under `name`.

    Raises:
        ModelError: if there is none, such as in another process, or if torch cannot copy it.
    """
    if name not in _held:
        raise ModelError(
            "this one lived in the memory of another program",
            place="model",
            cure="give module:function in its place",
        )
    try:
        return copied(_held[name].module)
    # Torch cannot copy a tensor that was computed from others, as weight_norm does.
    except RuntimeError as error:
        raise ModelError(
            f"it cannot be copied ({str(error).splitlines()[0]})",
            place="model",
            cure=(
                "if the old torch.nn.utils.weight_norm is in it, take "
                "torch.nn.utils.parametrizations.weight_norm"
            ),
        ) from error


def remember_spec(module: nn.Module, spec: Any) -> None:
    """Remembers the spec of a network that a command returns, as long as the network exists."""
    _specs[module] = spec


def spec_of(module: nn.Module) -> Any:
    """Returns the spec of a network that a command has returned; None for others."""
    return _specs.get(module)


def saved_as(architecture: str, arguments: dict[str, JsonValue]) -> Named:
    """Returns architecture and arguments for files: of a module in memory those of `find_name`."""
    if architecture == HELD:
        found = _held.get(str(arguments.get("name")))
        if found is not None and found.named is not None:
            return found.named
    return Named(architecture, arguments)


def find_name(module: nn.Module) -> Named | None:
    """Looks for an architecture that builds the same network in another process.

    That is a list of torch.nn layers, or the module's own class if three things hold: it can be
    imported by its name, its arguments are attributes of the same names, and the network that it
    builds from them has the same layers, tensors and other attributes.

    Returns:
        The architecture, or None if there is none.
    """
    layers = layer_list.describe(module)
    if layers is not None:
        return Named(layer_list.NAME, layers)
    kind = type(module)
    # Another process cannot import a class from inside a function, or from a notebook.
    if "." in kind.__qualname__ or kind.__module__ in ("__main__", "builtins"):
        return None
    try:
        home = sys.modules.get(kind.__module__) or importlib.import_module(kind.__module__)
        arguments = _arguments(module)
        if getattr(home, kind.__name__) is not kind or arguments is None:
            return None
        again = _built(module, arguments)
        same = (
            repr(again) == repr(module)
            and _buffers(again) == _buffers(module)
            and _settings(again) == _settings(module)
        )
    # A user's constructor may raise anything: then the class is not built like this.
    except Exception:
        return None
    return Named(f"{kind.__module__}:{kind.__name__}", arguments) if same else None


def _built(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Builds the class of `module` from these arguments, and loads the module's tensors."""
    # A constructor draws fresh weights: the user's own sequence of random numbers must not move.
    with torch.random.fork_rng(devices=[]):
        again = type(module)(**arguments)
        again.load_state_dict(module.state_dict())
    return again


@torch.no_grad()
def check_name(module: nn.Module, name: str, x: Inputs) -> bool:
    """Checks on examples `x` that a module and the one built from its `Named` compute the same.

    Attributes that `find_name` cannot compare may decide what a network computes.

    Args:
        module: the module of the user.
        name: under which it is registered. If the two differ, its `Named` is removed, so that files
            do not pretend to rebuild it.
        x: a batch of examples.

    Returns:
        Whether they compute the same, or need no check: the module does not run on `x` (an error
        that the caller will meet anyway), or it is a list of torch.nn layers.
    """
    found = _held[name]
    if found.named is None or ":" not in found.named.architecture:
        return True
    try:
        mine = _outputs(held(name), x)
    except Exception:
        return True
    try:
        theirs = _outputs(_built(module, found.named.arguments), x)
        same = len(mine) == len(theirs) and all(map(_equal, mine, theirs))
    # It runs here, but not as a file would build it.
    except Exception:
        same = False
    if not same:
        _held[name] = _Held(found.module, None)
    return same


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, equal_nan=True)


def _outputs(module: nn.Module, x: Inputs) -> list[Tensor]:
    # The same seed for both modules, in case that forward draws random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [part for part in tree_leaves(call(module.eval(), x)) if isinstance(part, Tensor)]


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Returns the arguments of the constructor, from attributes of the same names.

    Arguments without such an attribute are taken to have their defaults.

    Returns:
        None if a value is none of JSON, or an argument has neither attribute nor default.
    """
    arguments: dict[str, Any] = {}
    attributes = vars(module)
    for name, parameter in inspect.signature(type(module).__init__).parameters.items():
        if name == "self" or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            continue
        has_default = parameter.default is not parameter.empty
        value = layer_list.as_json(attributes.get(name, parameter.default))
        if value is NotImplemented or (not has_default and name not in attributes):
            return None
        if name in attributes or value != parameter.default:
            arguments[name] = value
    return arguments


def _buffers(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in module.named_buffers()]


def _settings(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Returns the attributes of all modules that may change what they compute, hooks included."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        settings = {}
        for key, value in vars(part).items():
            if _is_setting(key, value):
                settings[key] = _comparable(value)
        found.append((name, settings))
    return found


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute may change what a module computes.

    A forward that was set on the object counts, and hooks do if there are any.
    """
    if name in ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        return False
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
        return bool(value)
    return True


def _comparable(value: Any) -> Any:
    """Returns a value that is equal for two networks which were built alike.

    Two functions are equal if their code, defaults and closures are; of an object without `__eq__`
    only the type is compared.
    """
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), value.tolist())
    if isinstance(value, MethodType):
        return ("method", _comparable(value.__func__))
    if isinstance(value, FunctionType):
        cells = [_comparable(cell.cell_contents) for cell in value.__closure__ or ()]
        return (
            value.__module__,
            value.__code__,
            _comparable(value.__defaults__),
            _comparable(value.__kwdefaults__),
            cells,
        )
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        return ("partial", *map(_comparable, parts))
    if isinstance(value, nn.Module):
        return ("module", type(value), repr(value))
    if isinstance(value, list | tuple):
        return [_comparable(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _comparable(part) for key, part in value.items()}
    compares: object = type(value).__eq__
    return value if compares is not object.__eq__ or callable(value) else type(value)
