"""Detects and undoes a change of buffers or parameters by a forward pass on private examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Guard:
    """A copy of a model's buffers and parameters, taken before a forward pass on private examples.

    A forward pass that changes the model stores private data in it without noise. Examples: the
    running statistics of a normalisation, or `nn.Embedding(max_norm=...)`, which rescales the rows
    of the tokens that it reads. `put_back_` undoes such a change before the next example.
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
        """Restores every buffer and parameter that has changed since the last call.

        Returns:
            The text of an error: the first changed tensor and a cure. "" if nothing changed.
        """
        now = _named_tensors(self._model)
        problem = ""
        # The original names are included, because the forward pass may have removed a tensor.
        for name in dict.fromkeys([*now, *self._originals]):
            if self._unchanged(name, now.get(name)):
                continue
            self._restore_(name)
            problem = problem or _problem(name, isinstance(now.get(name), nn.Parameter))
        return problem

    def _unchanged(self, name: str, now: Tensor | None) -> bool:
        # Every in-place operation increments `_version`, so values need not be compared.
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
        # The forward pass has registered a new tensor: it is removed.
        if name not in self._originals:
            del table[leaf]
            return
        tensor, copy = self._originals[name]
        if tensor.shape == copy.shape:
            tensor.copy_(copy)
        else:
            # The forward pass has resized the tensor in place, so `copy_` is not possible.
            tensor.data = copy.clone()
        table[leaf] = tensor  # type: ignore[assignment]
        self._versions[name] = tensor._version


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def _problem(name: str, parameter: bool) -> str:
    if parameter:
        return (
            f"model.{name}: the forward pass changed this parameter during a private step, so it "
            "keeps private data without noise; leave max_norm out if this is an embedding"
        )
    return (
        f"model.{name}: this buffer changed during a private step, so it keeps private data "
        "without noise; use a layer without running statistics"
    )
