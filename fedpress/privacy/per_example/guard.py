"""Buffers and parameters that a forward pass must not change: noticed, named and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Guard:
    """Holds what a model is before private examples run through it.

    A forward pass that writes into the model keeps something of a private example without noise. What it wrote is taken
    back, so that neither the next example nor the next request meets it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copies every buffer and parameter of `model`."""
        self._model = model
        self._held = {
            name: (value, value.detach().clone()) for name, value in _named(model).items()
        }
        self._versions = {name: value._version for name, value in _named(model).items()}

    def put_back_(self) -> str:
        """Undoes every change since the last call; returns what was changed first and the cure, empty if nothing."""
        now = _named(self._model)
        names = [*now, *(name for name in self._held if name not in now)]
        changed = [name for name in names if not self._as_before(name, now.get(name))]
        for name in changed:
            self._put_back_(name)
        return _said(changed[0], isinstance(now.get(changed[0]), nn.Parameter)) if changed else ""

    def _as_before(self, name: str, now: Tensor | None) -> bool:
        return (
            name in self._held
            and self._held[name][0] is now
            and self._versions[name] == now._version
        )

    @torch.no_grad()
    def _put_back_(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        table = module._parameters if leaf in module._parameters else module._buffers
        if name not in self._held:  # it was registered on the way
            del table[leaf]
            return
        tensor, copy = self._held[name]
        if tensor.shape == copy.shape:
            tensor.copy_(copy)
        else:
            tensor.data = copy.clone()
        table[leaf] = tensor  # type: ignore[assignment]
        self._versions[name] = tensor._version


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _said(name: str, parameter: bool) -> str:
    if parameter:
        return (
            f"model.{name}: the forward pass changed this parameter during a private step, so it keeps private data "
            "without noise; an embedding does so with max_norm: leave it out"
        )
    return (
        f"model.{name}: this buffer changed during a private step, so it keeps private data without noise; use a layer "
        "without running statistics"
    )
