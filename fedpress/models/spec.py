"""A model as numbers: architecture, arguments and the resized tensors rebuild a pruned network without a pickle."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpress.calls import Numbers, numbers_in, set_numbers_
from fedpress.errors import ModelError, did_you_mean
from fedpress.layers import replace_, tensor
from fedpress.masked import take_in_
from fedpress.models.plain import CNN, MLP
from fedpress.models.resnet import resnet18, resnet_small
from fedpress.quantized import LayerGrids, fold_layers_, quantize_layers_

ARCHITECTURES: dict[str, Any] = {"resnet18": resnet18, "resnet-small": resnet_small, "cnn": CNN, "mlp": MLP}


class ModelSpec(BaseModel):
    """How to build a model: its architecture and arguments, and what compression changed.

    `architecture` is a row of `ARCHITECTURES` or `package.module:function`. `resized` maps
    the name of every parameter or buffer that pruning changed to its new shape, `numbers` are the sizes in forward
    code that had to change with them. `sparse` names
    the parameters whose zeros are pruned weights: whoever trains them keeps them zero. `folded` maps a batch norm
    to the layer that took it in, `quantized` a layer to the grids of its weights and inputs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    arguments: dict[str, JsonValue] = {}
    resized: dict[str, tuple[int, ...]] = {}
    numbers: Numbers = {}
    sparse: tuple[str, ...] = ()
    folded: dict[str, str] = {}
    quantized: dict[str, LayerGrids] = {}
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """Builds the network with the right shapes and fresh weights.

        Raises:
            ModelError: if the architecture is unknown, its arguments do not fit, or it returns no module; if what
                compression changed belongs to another model.
        """
        model = self.build_dense()
        resize_(model, self.resized)
        _renumber_(model, self.numbers)
        fold_layers_(model, self.folded)
        quantize_layers_(model, self.quantized)
        self._keep_zeros()
        return model

    def _keep_zeros(self) -> None:
        for name in self.sparse:
            grids = self.quantized.get(name.removesuffix(".weight"))
            if grids is not None and grids.weights is not None and not grids.weights.has_zero:
                raise ModelError(
                    f"spec: '{name}' is sparse, but a binary grid has no zero to keep; quantize it to ternary instead"
                )

    def build_dense(self) -> nn.Module:
        """Builds the network as its architecture says, before any pruning."""
        return self._dense()[0]

    def take_in(self) -> tuple[ModelSpec, nn.Module]:
        """Builds the network as its architecture says, and notes the zeros of the masks that it comes with."""
        model, masked = self._dense()
        return self.model_copy(update={"sparse": masked}), model

    def _dense(self) -> tuple[nn.Module, tuple[str, ...]]:
        builder = _builder(self.architecture)
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in self.arguments.items()}
        try:
            model = builder(**arguments)
        except Exception as error:  # a user's function may raise anything
            raise ModelError(f"model.arguments: '{self.architecture}' cannot be built: {error}") from error
        if not isinstance(model, nn.Module):
            raise ModelError(f"model: '{self.architecture}' returned {type(model).__name__}; return a torch.nn.Module")
        return model, take_in_(model)


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
    except Exception as error:  # importing runs the user's file, which may raise anything
        raise ModelError(f"model.architecture: cannot load '{name}': {error}; is its folder on PYTHONPATH?") from error


def resize_(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    """Gives the named parameters and buffers of `model` smaller shapes (fresh zeros) and mends the layers' sizes.

    Raises:
        ModelError: if a name is not in the model, or a shape does not fit into that of its tensor.
    """
    new: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        try:
            old = tensor(model, name)
        except AttributeError as error:
            raise ModelError(f"spec.resized: the model has no tensor '{name}'; the spec is of another model") from error
        if len(shape) != old.dim() or not all(0 < n <= most for n, most in zip(shape, old.shape, strict=True)):
            raise ModelError(
                f"spec.resized: '{name}' of shape {tuple(old.shape)} cannot become {tuple(shape)}; "
                "the spec is of another model"
            )
        empty = old.detach().new_zeros(tuple(shape))
        new[name] = nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
    replace_(model, new)


def shapes_that_differ(model: nn.Module, dense: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of `model` that has another shape in `dense`."""
    old = {name: t.shape for name, t in dense.state_dict().items()}
    return {n: tuple(t.shape) for n, t in model.state_dict().items() if n in old and t.shape != old[n]}


def _renumber_(model: nn.Module, numbers: Numbers) -> None:
    try:
        set_numbers_(model, numbers)
    except AttributeError as error:
        raise ModelError(f"spec.numbers: {error}; the spec is of another model") from error


def what_pruning_changed(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Returns the fields of a spec, `resized` and `numbers`, that make `dense` as small as `model`."""
    return {"resized": shapes_that_differ(model, dense), "numbers": numbers_in(model)}


def save_model(folder: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Writes `model.safetensors` and `spec.json` into `folder`; a shared tensor is written under each of its names."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}
    tensors = {n: t.contiguous() for n, t in copies.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load_model(folder: Path) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of `folder` from its spec and numbers alone.

    Raises:
        ModelError: if a file is missing or corrupt, or the numbers do not fit the spec.
    """
    numbers, described = Path(folder) / "model.safetensors", Path(folder) / "spec.json"
    for path in (described, numbers):
        if not path.is_file():
            raise ModelError(f"{folder}: no model here ({path.name} is missing); run the stage again")
    try:
        spec = ModelSpec.model_validate_json(described.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise ModelError(f"{described}: corrupt ({_first_line(error)}); run the stage again") from error
    try:
        tensors = load_file(numbers)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{numbers}: corrupt ({_first_line(error)}); run the stage again") from error
    model = spec.build()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ModelError(f"{folder}: model.safetensors does not fit spec.json ({last}); run the stage again") from error
    return spec, model


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return str(error).splitlines()[0]
