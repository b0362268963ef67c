"""Notices, names and undoes what a forward pass writes into a model's buffers and parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Guard:
    """A copy of a model's buffers and parameters, taken before private examples run through it.

    A forward pass that writes into the model stores private data there without noise: running
    statistics of a normalisation, or `nn.Embedding(max_norm=...)`, which shortens the rows of the
    tokens that it reads. `put_back_` undoes this, so that neither the next example nor the next
    request sees it.
    """

    def __init__(self, model: nn.Module) -> None:
        """Copies every buffer and parameter of `model`."""
        self._model = model
        self._originals: dict[str, tuple[Tensor, Tensor]] = {}
        self._versions: dict[str, int] = {}
        for name, value in _named_tensors(model).items():
            self._originals[name] = value, value.detach().clone()
            self._versions[name] = value._version

    def put_back_(self) -> str:
        """Undoes every change since the last call.

        Returns:
            Which tensor changed first and what to do about it; empty if nothing changed.
        """
        now = _named_tensors(self._model)
        problem = ""
        # Tensors that the forward pass removed are in the originals only.
        for name in dict.fromkeys([*now, *self._originals]):
            if self._unchanged(name, now.get(name)):
                continue
            self._restore_(name)
            problem = problem or _problem(name, isinstance(now.get(name), nn.Parameter))
        return problem

    def _unchanged(self, name: str, now: Tensor | None) -> bool:
        # Every in-place operation counts `_version` up, so no values need to be compared.
        return (
            name in self._originals
            and self._originals[name][0] is now
            and self._versions[name] == now._version
        )

    @torch.no_grad()
    def _restore_(self, name: str) -> None:
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        table = module._parameters if leaf in module._parameters else module._buffers
        # A tensor that the forward pass registered itself is removed again.
        if name not in self._originals:
            del table[leaf]
            return
        tensor, copy = self._originals[name]
        if tensor.shape == copy.shape:
            tensor.copy_(copy)
        else:
            # The forward pass resized it in place; a copy of values would not fit.
            tensor.data = copy.clone()
        table[leaf] = tensor  # type: ignore[assignment]
        self._versions[name] = tensor._version


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _problem(name: str, parameter: bool) -> str:
    if parameter:
        return (
            f"model.{name}: the forward pass changed this parameter during a private step, so it "
            "keeps private data without noise; an embedding does so with max_norm: leave it out"
        )
    return (
        f"model.{name}: this buffer changed during a private step, so it keeps private data "
        "without noise; use a layer without running statistics"
    )
