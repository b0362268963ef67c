"""Registers the user's modules by name, and finds importable architectures that rebuild them.

A recipe (the settings of a run) is text. It refers to a user's module by the name under which the
module is registered here. This name is valid only in this process. For other processes, this file
looks for a `Buildable`: an architecture and its arguments that build the same network.
"""

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
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fedpress.core.inputs import Inputs, call
from fedpress.errors import ModelError, first_line
from fedpress.models import layer_list
from fedpress.nn.resize import copied

# The architecture of a registered module; its argument is the module's name. Saved recipes contain
# this text, so it must not change.
IN_MEMORY = "fedpress.models.memory:held"
# A recipe names a registered teacher (a network to distill from) by this prefix and the name under
# which it is registered, such as "memory:1".
TEACHER = "memory:"


@dataclass(frozen=True)
class Buildable:
    """An architecture and its arguments, from which another process can rebuild a network.

    Attributes:
        architecture: a name of fedpress such as "torch-layers", or `package.module:Class`.
        arguments: arguments of the architecture, by name.
    """

    architecture: str
    arguments: dict[str, JsonValue]


@dataclass(eq=False)
class _Registered:
    module: nn.Module
    named: Buildable | None
    spec: Any = None


@dataclass(frozen=True, eq=False)
class _Remembered:
    """The spec (`ModelSpec`: how to build it) of a network that fedpress returned to the user.

    `origin` is the registered module from which the network was made; None if there is none. It is
    stored to keep the module registered as long as the network exists.
    """

    spec: Any
    origin: _Registered | None


# Weak references: an entry exists until its `with registered(...)` block has ended, and no network
# that was made from the module exists any more.
_registered: WeakValueDictionary[str, _Registered] = WeakValueDictionary()
_numbers = count(1)
_specs: WeakKeyDictionary[nn.Module, _Remembered] = WeakKeyDictionary()


@contextmanager
def registered(
    module: nn.Module, named: Buildable | None = None, spec: Any = None
) -> Iterator[str]:
    """Registers a module during a `with` block; yields its name for `registered_copy`.

    Args:
        module: the module; it is not changed.
        named: the architecture to write into files (see `find_buildable`). None: another process
            cannot open files of the model.
        spec: the spec of the module, if an earlier call of fedpress returned the module (see
            `spec_that_builds`). Saved files then include the changes that this call made, such as
            pruning.
    """
    name = str(next(_numbers))
    here = _Registered(module, named, spec)
    _registered[name] = here
    yield name
    del here


def registered_copy(name: str) -> nn.Module:
    """Returns a copy of the module that is registered under `name`.

    Raises:
        ModelError: if no module has this name (in another process, say), or torch cannot copy it.
    """
    if name not in _registered:
        raise ModelError(
            "the model was a module in the memory of another process",
            place="model",
            cure='give the model as "package.module:function", which every process can import',
        )
    try:
        return copied(_registered[name].module)
    # torch cannot copy a tensor that was computed from others, such as those of weight_norm.
    except RuntimeError as error:
        raise ModelError(
            f"it cannot be copied ({first_line(error)})",
            place="model",
            cure=(
                "if the old torch.nn.utils.weight_norm is in it, take "
                "torch.nn.utils.parametrizations.weight_norm"
            ),
        ) from error


# Saved recipes contain "fedpress.models.memory:held", so this name must stay.
held = registered_copy


def remember_spec(module: nn.Module, spec: Any) -> None:
    """Stores the spec of a network that fedpress returns to the user, until the network is gone."""
    _specs[module] = _Remembered(spec, _registered_as(spec.architecture, spec.arguments))


def spec_of(module: nn.Module) -> Any:
    """Returns the spec of a network that fedpress has returned; None for any other network."""
    found = _specs.get(module)
    return None if found is None else found.spec


def spec_that_builds(module: nn.Module) -> Any:
    """Returns the spec of a network that fedpress has returned, if the spec still builds it.

    Returns None if fedpress did not return this network, or if the user has changed its layers or
    attributes since then.
    """
    spec = spec_of(module)
    if spec is None:
        return None
    try:
        # Building draws random weights. fork_rng restores the user's random state afterwards.
        with torch.random.fork_rng(devices=[]):
            again = spec.build()
        again.load_state_dict(module.state_dict())
    # A user's constructor may raise anything. Loading raises if the shapes differ.
    except Exception:
        return None
    return spec if _same(again, module) else None


def held_spec(architecture: str, arguments: Mapping[str, JsonValue]) -> Any:
    """Returns the spec with which a module was registered; None if there is none."""
    found = _registered_as(architecture, arguments)
    return None if found is None else found.spec


def _registered_as(architecture: str, arguments: Mapping[str, JsonValue]) -> _Registered | None:
    return _registered.get(str(arguments.get("name"))) if architecture == IN_MEMORY else None


def buildable_for_files(architecture: str, arguments: dict[str, JsonValue]) -> Buildable:
    """Returns the architecture and arguments to write into files.

    If a registered module has a `Buildable`, this is returned. Otherwise the result has the
    arguments of this function.
    """
    found = _registered_as(architecture, arguments)
    if found is not None and found.named is not None:
        return found.named
    return Buildable(architecture, arguments)


def find_buildable(module: nn.Module) -> Buildable | None:
    """Looks for an architecture that builds the same network in another process.

    The architecture is a list of torch.nn layers, or the module's own class. The class is used only
    if it can be imported, if its constructor's arguments are attributes with the same names, and if
    the network built from them has the same layers, tensors and other attributes.

    Returns:
        The architecture and its arguments; None if no architecture was found.
    """
    layers = layer_list.describe(module)
    if layers is not None:
        return Buildable(layer_list.NAME, layers)
    kind = type(module)
    # Another process cannot import a class from inside a function, or from a notebook.
    if "." in kind.__qualname__ or kind.__module__ in ("__main__", "builtins"):
        return None
    try:
        home = sys.modules.get(kind.__module__) or importlib.import_module(kind.__module__)
        arguments = _arguments(module)
        if getattr(home, kind.__name__) is not kind or arguments is None:
            return None
        rebuilt = _built(module, arguments)
        same = _same(rebuilt, module)
    # A user's constructor may raise anything. If it raises, these are not the right arguments.
    except Exception:
        return None
    return Buildable(f"{kind.__module__}:{kind.__name__}", arguments) if same else None


def why_no_name(module: nn.Module) -> str:
    """Returns the reason, as a sentence, why `find_buildable` returns None for this module.

    >>> class Own(nn.Module): ...
    >>> why_no_name(nn.Sequential(Own()))
    'a layer in it, Own, is not of torch.nn'
    """
    kind = type(module)
    if kind.__module__.startswith("torch.nn"):
        own = next(
            (part for part in module.modules() if not type(part).__module__.startswith("torch.nn")),
            None,
        )
        if own is None:
            return "it has hooks, shared layers or attributes that a list of layers cannot express"
        return f"a layer in it, {type(own).__name__}, is not of torch.nn"
    if "." in kind.__qualname__ or kind.__module__ in ("__main__", "builtins"):
        return (
            "its class is defined in a script, notebook or function, where no other process can "
            "import it"
        )
    return "its class cannot rebuild it from the attributes that have the names of its arguments"


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two modules have the same layers, buffers and other attributes."""
    return (
        repr(one) == repr(other)
        and _buffers(one) == _buffers(other)
        and _settings(one) == _settings(other)
    )


def _built(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Builds the class of `module` from these arguments, and loads the module's tensors."""
    # The constructor draws random weights. fork_rng restores the user's random state afterwards.
    with torch.random.fork_rng(devices=[]):
        rebuilt = type(module)(**arguments)
        rebuilt.load_state_dict(module.state_dict())
    return rebuilt


@torch.no_grad()
def check_buildable(module: nn.Module, name: str, x: Inputs) -> bool:
    """Compares the outputs of a module with the outputs of a network built from its `Buildable`.

    `find_buildable` cannot compare some attributes, but they may change the outputs of a network.
    If the outputs differ or the built network fails, the `Buildable` is removed from the registry,
    so that it is not written into files.

    Args:
        module: the user's module.
        name: the name under which it is registered.
        x: a batch of examples.

    Returns:
        False if the outputs differ or the built network fails, else True. Nothing is compared if
        the module has no `Buildable`, if its `Buildable` is a list of torch.nn layers, or if the
        module itself fails on `x`. The caller runs the module later and notices the failure.
    """
    found = _registered[name]
    if found.named is None or ":" not in found.named.architecture:
        return True
    try:
        mine = _outputs(registered_copy(name), x)
    except Exception:
        return True
    try:
        theirs = _outputs(_built(module, found.named.arguments), x)
        same = len(mine) == len(theirs) and all(map(_equal, mine, theirs))
    # The user's module runs, but the rebuilt module fails.
    except Exception:
        same = False
    if not same:
        found.named = None
    return same


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, equal_nan=True)


def _outputs(module: nn.Module, x: Inputs) -> list[Tensor]:
    # Both modules get the same seed, in case their forward draws random numbers.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [part for part in tree_leaves(call(module.eval(), x)) if isinstance(part, Tensor)]


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    """Returns the constructor's arguments, taken from the attributes with the same names.

    An argument without such an attribute is assumed to have its default.

    Returns:
        None if a value has no JSON form, or an argument has neither attribute nor default.
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
    """Returns the attributes, including hooks, that may change the outputs of each module."""
    found = []
    for name, part in module.named_modules(remove_duplicate=False):
        settings = {}
        for key, value in vars(part).items():
            if _is_setting(key, value):
                settings[key] = _comparable(value)
        found.append((name, settings))
    return found


def _is_setting(name: str, value: object) -> bool:
    """Returns whether an attribute may change the outputs of a module.

    Examples: hooks, and a `forward` that was set on the object. Parameters and buffers are compared
    elsewhere.
    """
    if name in ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        return False
    if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
        return bool(value)
    return True


def _comparable(value: Any) -> Any:
    """Converts an attribute to a value that can be compared between two networks.

    Functions are compared by code, defaults and closure. An object without its own `__eq__` is
    compared by identity if it can be called, else by its type alone.
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
