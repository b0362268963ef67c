"""Loads a state dict of another program into a model, and applies masks of torch's pruning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpress.errors import Argument, ModelError, first_line
from fedpress.models.foreign import identify

# Keys under which training programs put the state dict in their checkpoints.
INSIDE = ("state_dict", "model_state_dict", "model")


def load_weights_(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Loads a state dict into `model`, from safetensors or a file of `torch.save`.

    No code of the file is run. A checkpoint may hold the state dict under one of the keys `INSIDE`.
    A prefix that all names share, such as `module.` from DistributedDataParallel, is removed. Two
    tensors `x_orig` and `x_mask` of `torch.nn.utils.prune` are replaced by their product, named
    `x`.

    Returns:
        The names of the parameters that had masks, for `ModelSpec.sparse`.

    Raises:
        ModelError: if the file is missing, has no state dict, or does not fit the model.
    """
    wanted = set(model.state_dict())
    tensors = _without_prefix(_read_state_dict(Path(path)), wanted)
    tensors, masked = _apply_masks(tensors, wanted)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"these weights do not fit the model ({last})",
            place=path,
            cure=("give the weights of this model, or set ", Argument("model.arguments")),
        ) from error
    return masked


# Errors of safetensors and torch for files that they cannot read.
UNREADABLE = (
    SafetensorError,
    UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    KeyError,
)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "no such file"
        raise ModelError(what, place=path, cure="give a state dict as .safetensors or .pt")
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            # weights_only=True, because unpickling could run code that is hidden in the file.
            found = torch.load(path, "cpu", weights_only=True)
    except UNREADABLE as error:
        foreign = identify(path)
        if foreign is not None and "state dict" not in foreign.what:
            raise ModelError(
                f"cannot be read as plain tensors: {foreign.what}",
                place=path,
                cure=foreign.cure,
            ) from error
        raise ModelError(
            f"cannot be read as plain tensors ({first_line(error)[:120]})",
            place=path,
            cure="save model.state_dict() as .safetensors or with torch.save",
        ) from error
    if isinstance(found, Mapping):
        nested = [found[key] for key in INSIDE if isinstance(found.get(key), Mapping)]
        found = nested[0] if nested else found
    is_mapping = isinstance(found, Mapping)
    if not is_mapping or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(
            "this is no state dict", place=path, cure="save model.state_dict(), not the model"
        )
    return dict(found)


def _without_prefix(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Removes a prefix that all names share, if the remaining names are exactly `wanted`.

    Otherwise the tensors are returned unchanged, so that torch's error shows the file's own names.
    """
    first = next(iter(tensors), "")
    if set(tensors) == wanted:
        return tensors
    # A prefix ends at a dot of the first name. Each dot is tried, because wrappers may be nested.
    for at, letter in enumerate(first):
        prefix = first[: at + 1]
        if letter != "." or not all(name.startswith(prefix) for name in tensors):
            continue
        shorter = {name.removeprefix(prefix): value for name, value in tensors.items()}
        if set(shorter) == wanted:
            return shorter
    return tensors


def _apply_masks(
    tensors: dict[str, Tensor], wanted: set[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Replaces `x_orig` and `x_mask` by their product `x`; also returns the names of products."""
    # If the model itself is masked, it has `x_orig` and no `x`, so nothing is replaced.
    found = dict(tensors)
    masked = []
    for key in tensors:
        name = key.removesuffix("_orig")
        if name != key and name in wanted and f"{name}_mask" in tensors:
            found[name] = found.pop(key) * found.pop(f"{name}_mask")
            masked.append(name)
    return found, tuple(masked)
