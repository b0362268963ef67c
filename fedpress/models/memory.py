"""Modules that live in the memory of this process: how a recipe names them, and what is saved in their place."""

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

HELD = "fedpress.models.memory:held"
TEACHER = "memory:"


@dataclass(frozen=True)
class Named:
    """What builds a network again: an architecture and its arguments."""

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
    """Gives the name under which `held` builds copies of the module while the block lasts.

    Args:
        module: which is not changed.
        named: what is written into files in its place (see `find_name`); None: its files cannot be opened again.
    """
    name = str(next(_numbers))
    _held[name] = _Held(module, named)
    try:
        yield name
    finally:
        del _held[name]


def held(name: str) -> nn.Module:
    """Builds a copy of the module in memory under `name`.

    Raises:
        ModelError: if it is not there any more: such a model lives as long as the process.
    """
    if name not in _held:
        raise ModelError(
            "this one lived in the memory of another program",
            place="model",
            cure="give module:function in its place",
        )
    try:
        return copied(_held[name].module)
    except RuntimeError as error:  # torch copies no tensor that was computed from others
        raise ModelError(
            f"it cannot be copied ({str(error).splitlines()[0]})",
            place="model",
            cure=(
                "if the old torch.nn.utils.weight_norm is in it, take "
                "torch.nn.utils.parametrizations.weight_norm"
            ),
        ) from error


def remember_spec(module: nn.Module, spec: Any) -> None:
    """Notes the spec of a network that a command gives back; it is forgotten with the network."""
    _specs[module] = spec


def spec_of(module: nn.Module) -> Any:
    """Returns the spec of a network that a command gave back, None of any other."""
    return _specs.get(module)


def saved_as(architecture: str, arguments: dict[str, JsonValue]) -> Named:
    """Returns what files name: for a module in memory what builds it again, if anything does."""
    if (
        architecture == HELD
        and (found := _held.get(str(arguments.get("name")))) is not None
        and found.named
    ):
        return found.named
    return Named(architecture, arguments)


def find_name(module: nn.Module) -> Named | None:
    """Looks for what builds the same network again: a list of torch's own layers, or the module's own class.

    A class counts if it can be imported by its name, if all its arguments can be read back from attributes of the same
    names, and if what it builds has the same tensors and, with the same numbers in them, the same text.
    """
    layers = layer_list.describe(module)
    if layers is not None:
        return Named(layer_list.NAME, layers)
    kind = type(module)
    if "." in kind.__qualname__ or kind.__module__ in ("__main__", "builtins"):
        return None
    try:
        found = getattr(
            sys.modules.get(kind.__module__) or importlib.import_module(kind.__module__),
            kind.__name__,
        )
        arguments = _arguments(module)
        if found is not kind or arguments is None:
            return None
        again = _built(module, arguments)
        same = repr(again) == repr(module) and _buffers(again) == _buffers(module)
        same = same and _settings(again) == _settings(module)
    except Exception:  # whatever somebody's own constructor raises: then it is not built so
        return None
    return Named(f"{kind.__module__}:{kind.__name__}", arguments) if same else None


def _built(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Builds what a file would: the class of `module` from these arguments, with the same numbers."""
    with torch.random.fork_rng(devices=[]):
        again = type(module)(**arguments)
        again.load_state_dict(module.state_dict())
    return again


@torch.no_grad()
def check_name(module: nn.Module, name: str, x: Inputs) -> bool:
    """Runs a module and what its name builds on examples `x`; where they differ, takes the name under `name` away.

    Attributes that `find_name` cannot compare may decide what a network computes. A module that does not run on `x` is
    left to those who need it to.
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
        same = len(mine) == len(theirs) and all(
            a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
            for a, b in zip(mine, theirs, strict=True)
        )
    except Exception:  # it runs here, and not as a file would build it
        same = False
    if not same:
        _held[name] = _Held(found.module, None)
    return same


def _outputs(module: nn.Module, x: Inputs) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [part for part in tree_leaves(call(module.eval(), x)) if isinstance(part, Tensor)]


def _arguments(module: nn.Module) -> dict[str, Any] | None:
    arguments: dict[str, Any] = {}
    for name, about in inspect.signature(type(module).__init__).parameters.items():
        if name == "self" or about.kind in (about.VAR_POSITIONAL, about.VAR_KEYWORD):
            continue
        value = layer_list._plain(vars(module).get(name, about.default))
        if value is NotImplemented or (about.default is about.empty and name not in vars(module)):
            return None
        if name in vars(module) or value != about.default:
            arguments[name] = value
    return arguments


def _buffers(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in module.named_buffers()]


def _settings(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Returns what forward may read besides tensors and layers, and the constructor may have set; hooks besides."""
    return [
        (name, {k: _known(v) for k, v in vars(part).items() if _is_setting(k, v)})
        for name, part in _parts(module)
    ]


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return iter(module.named_modules(remove_duplicate=False))


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute says how a module computes: also a forward put in by hand, and hooks that are there."""
    if name in ("training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        return False
    return (
        bool(value)
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        else True
    )


def _known(value: Any) -> Any:
    """Returns what is equal for two networks that were built alike: of functions their code and what they hold."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), value.tolist())
    if isinstance(value, MethodType):
        return ("method", _known(value.__func__))
    if isinstance(value, FunctionType):
        cells = [_known(cell.cell_contents) for cell in value.__closure__ or ()]
        return (
            value.__module__,
            value.__code__,
            _known(value.__defaults__),
            _known(value.__kwdefaults__),
            cells,
        )
    if isinstance(value, partial):
        return ("partial", _known(value.func), _known(value.args), _known(value.keywords))
    if isinstance(value, nn.Module):
        return ("module", type(value), repr(value))
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _known(part) for key, part in value.items()}
    compares: object = type(value).__eq__
    return value if compares is not object.__eq__ or callable(value) else type(value)
