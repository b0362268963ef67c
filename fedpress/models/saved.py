"""Saves a model as a folder with `spec.json` and `model.safetensors`, and loads it.

The spec says how to build the network: architecture, arguments and shapes. Nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedpress.core import checksums
from fedpress.errors import ModelError, first_line, placing
from fedpress.models.spec import ModelSpec


def save_model(folder: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Writes `model.safetensors` and `spec.json` into `folder`.

    A tensor that several layers share is written once for each of its names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        # Tensors are copied, because safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    save_file(tensors, folder / "model.safetensors")
    # The spec is written last: a folder counts as a model only if it has a spec.
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load_model(folder: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of `folder` from its spec and tensors.

    Args:
        folder: the folder with `spec.json` and `model.safetensors`.
        allow_code: functions, as `module:function`, that the spec may name as its architecture.
            Architectures of fedpress need no entry.

    Raises:
        ModelError: if a file is missing or corrupt, if the tensors do not fit the spec, if the spec
            names a function that is not allowed, or if the network exceeds `fedpress.core.limits`.
    """
    spec_file, tensor_file = Path(folder) / "spec.json", Path(folder) / "model.safetensors"
    if not Path(folder).exists():
        raise ModelError(
            f"there is no '{folder}'",
            place="model",
            cure="give the folder of a model or of a run, or a packed file",
        )
    # Checked here, because the error of safetensors has no cure.
    for path in (spec_file, tensor_file):
        if not path.is_file():
            raise ModelError(
                f"no model here ({path.name} is missing)",
                place=folder,
                cure="run the stage again",
            )
    try:
        with placing(spec_file):
            spec = ModelSpec.of_file(spec_file.read_text("utf-8"), allow_code)
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise ModelError(
            f"corrupt ({_first_line(error)})", place=spec_file, cure=_repair(folder)
        ) from error
    try:
        tensors = load_file(tensor_file)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"corrupt ({_first_line(error)})", place=tensor_file, cure=_repair(folder)
        ) from error
    model = spec.build_within_limits()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"model.safetensors does not fit spec.json ({last})",
            place=folder,
            cure=_repair(folder),
        ) from error
    # Checksums come last: the errors above say more exactly what is wrong with a file.
    for path in (spec_file, tensor_file):
        fault = checksums.fault(path)
        if fault:
            listed = checksums.list_of(path)
            changed = f"or if you have changed this file yourself, delete '{listed}'"
            raise ModelError(
                f"corrupt ({fault})", place=path, cure=f"{_repair(path.parent)}, {changed}"
            )
    return spec, model


def _repair(folder: Path) -> str:
    """Returns the advice of an error about damaged files of a model."""
    done = Path(folder) / "result.json"
    if done.exists():
        return f"delete '{done}' to do the stage again"
    return "run the stage again, or copy the folder again"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return first_line(error)
