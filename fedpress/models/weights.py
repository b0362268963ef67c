"""Weights that somebody else's program saved, a state dict, go into a model; masks of torch's own pruning with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpress.errors import Argument, ModelError
from fedpress.models.foreign import described

INSIDE = ("state_dict", "model_state_dict", "model")


def load_weights_(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Puts the state dict of `path` into `model`: safetensors, or what `torch.save` wrote, read without running code.

    Names may begin with the word of a wrapper, such as `module.` of DistributedDataParallel. A pair `x_orig`, `x_mask`
    of `torch.nn.utils.prune` becomes `x`, the product.

    Returns:
        The names of the parameters that came with masks: what `ModelSpec.sparse` notes.

    Raises:
        ModelError: if the file is missing, holds something else than tensors, or does not fit the model.
    """
    wanted = set(model.state_dict())
    tensors, masked = _unmasked(_without_prefix(_read(Path(path)), wanted), wanted)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"these weights do not fit the model ({last})",
            place=path,
            cure=("give those of this model, or set ", Argument("model.arguments")),
        ) from error
    return masked


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        what = "this is a folder" if path.is_dir() else "no such file"
        raise ModelError(f"{what}", place=path, cure="give a state dict as .safetensors or .pt")
    found: Any
    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True)
        )
    except (
        SafetensorError,
        UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        foreign = described(path)
        if foreign is not None and "state dict" not in foreign.what:
            raise ModelError(
                f"cannot be read as plain tensors, for {foreign.what}",
                place=path,
                cure=foreign.way,
            ) from error
        raise ModelError(
            f"cannot be read as plain tensors ({str(error).splitlines()[0][:120]})",
            place=path,
            cure="save model.state_dict() as .safetensors or with torch.save",
        ) from error
    if isinstance(found, Mapping):
        found = next((found[key] for key in INSIDE if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not all(
        isinstance(value, Tensor) for value in found.values()
    ):
        raise ModelError(
            "this is no state dict", place=path, cure="save model.state_dict(), not the model"
        )
    return dict(found)


def _without_prefix(tensors: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Takes the prefix off that all names share, where they are those of the model without it."""
    first = next(iter(tensors), "")
    for prefix in (first[: at + 1] for at, letter in enumerate(first) if letter == "."):
        if all(name.startswith(prefix) for name in tensors):
            bare = {name.removeprefix(prefix): value for name, value in tensors.items()}
            if set(bare) == wanted != set(tensors):
                return bare
    return tensors


def _unmasked(
    tensors: dict[str, Tensor], wanted: set[str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    pairs = {
        name: (f"{name}_orig", f"{name}_mask")
        for name in (key.removesuffix("_orig") for key in tensors if key.endswith("_orig"))
        if name in wanted and f"{name}_mask" in tensors
    }
    used = {key for pair in pairs.values() for key in pair}
    plain = {key: value for key, value in tensors.items() if key not in used}
    return plain | {name: tensors[a] * tensors[b] for name, (a, b) in pairs.items()}, tuple(pairs)
