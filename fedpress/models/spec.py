"""A model as numbers: architecture, arguments and the resized tensors rebuild a pruned network without a pickle."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedpress.errors import ModelError, did_you_mean
from fedpress.models.plain import CNN, MLP
from fedpress.models.resnet import resnet18, resnet_small

ARCHITECTURES: dict[str, Any] = {"resnet18": resnet18, "resnet-small": resnet_small, "cnn": CNN, "mlp": MLP}


class ModelSpec(BaseModel):
    """How to build a model: a row of `ARCHITECTURES` or `package.module:function`, its arguments, and what pruning resized.

    `resized` maps the name of every parameter or buffer that pruning changed to its new shape.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    arguments: dict[str, JsonValue] = {}
    resized: dict[str, tuple[int, ...]] = {}
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Builds the network with the right shapes and fresh weights.

        Raises:
            ModelError: if the architecture is unknown, its arguments do not fit, or it returns no module.
        """
        model = self.build_dense()
        resize_(model, self.resized)
        return model

    def build_dense(self) -> nn.Module:
        """Builds the network as its architecture says, before any pruning."""
        builder = _builder(self.architecture)
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()}
        try:
            model = builder(**arguments)
        except (TypeError, ValueError) as error:
            raise ModelError(f"model.arguments: '{self.architecture}' cannot be built: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"model: '{self.architecture}' returned {type(model).__name__}; return a torch.nn.Module")
        return model


def _builder(name: str) -> Any:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    module, colon, function = name.partition(":")
    if not colon:
        hint = did_you_mean(name, list(ARCHITECTURES))
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"model.architecture: no architecture '{name}'{hint}; use one of {known} or 'package.module:function'"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model.architecture: cannot load '{name}': {error}; is its folder on PYTHONPATH?") from error


def resize_(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Gives the named parameters and buffers of `model` new shapes (fresh zeros) and mends the modules' sizes.

    Raises:
        ModelError: if a name is not in the model or a shape has another number of dimensions.
    """
    touched = set()
    for name, shape in shapes.items():
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = model.get_submodule(owner_name)
            old = getattr(owner, leaf)
        except AttributeError as error:
            raise ModelError(f"spec.resized: the model has no tensor '{name}'; the spec is of another model") from error
        if not isinstance(old, torch.Tensor) or old.dim() != len(shape):
            raise ModelError(f"spec.resized: '{name}' cannot have shape {tuple(shape)}; the spec is of another model")
        new = torch.zeros(tuple(shape), dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            setattr(owner, leaf, new)
        touched.add(owner_name)
    for owner_name in touched:
        mend_sizes_(model.get_submodule(owner_name))


def mend_sizes_(module: nn.Module) -> None:
    """Makes the size attributes of one layer say what its tensors are."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.groups == module.in_channels:
            module.groups = weight.shape[0] // (module.out_channels // module.in_channels)
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = weight.shape[0]


def shapes_that_differ(model: nn.Module, dense: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of `model` that has another shape in `dense`."""
    old = {name: t.shape for name, t in dense.state_dict().items()}
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n in old and t.shape != old[n]}


def save_model(folder: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Writes `model.safetensors` and `spec.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu").contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load_model(folder: Path) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of `folder` from its spec and numbers alone.

    Raises:
        ModelError: if a file is missing or corrupt, or the numbers do not fit the spec.
    """
    folder = Path(folder)
    try:
        spec = ModelSpec.model_validate_json((folder / "spec.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no model here ({Path(error.filename or '').name} is missing)") from error
    except (ValidationError, SafetensorError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"{folder}: the model is corrupt ({first}); run the stage again") from error
    model = spec.build()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"{folder}: model.safetensors does not fit spec.json ({first}); run the stage again"
        ) from error
    return spec, model
