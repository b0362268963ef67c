"""Modules that live in the memory of this process: how a recipe names them, and what is saved in their place."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from fedpress.errors import ModelError
from fedpress.layers import copied
from fedpress.models import layer_list

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
        raise ModelError("model: this one lived in the memory of another program; give module:function in its place")
    try:
        return copied(_held[name].module)
    except RuntimeError as error:  # torch copies no tensor that was computed from others
        raise ModelError(
            f"model: it cannot be copied ({str(error).splitlines()[0]}); "
            "if the old torch.nn.utils.weight_norm is in it, take "
            "torch.nn.utils.parametrizations.weight_norm"
        ) from error


def saved_as(architecture: str, arguments: dict[str, JsonValue]) -> Named:
    """Returns what files name: for a module in memory what builds it again, if anything does."""
    if architecture == HELD and (found := _held.get(str(arguments.get("name")))) is not None and found.named:
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
        found = getattr(sys.modules.get(kind.__module__) or importlib.import_module(kind.__module__), kind.__name__)
        arguments = _arguments(module)
        if found is not kind or arguments is None:
            return None
        with torch.random.fork_rng(devices=[]):
            again = kind(**arguments)
            again.load_state_dict(module.state_dict())
    except Exception:  # whatever somebody's own constructor raises: then it is not built so
        return None
    same = repr(again) == repr(module) and _buffers(again) == _buffers(module) and _settings(again) == _settings(module)
    return Named(f"{kind.__module__}:{kind.__name__}", arguments) if same else None


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
    """Returns the plain attributes of all modules: numbers that forward reads, and the constructor may have set."""
    kinds = (bool, int, float, str, tuple, type(None))
    return [
        (name, {k: v for k, v in vars(part).items() if isinstance(v, kinds) and k != "training"})
        for name, part in module.named_modules()
    ]
