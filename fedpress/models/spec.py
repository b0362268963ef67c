"""A model as numbers: architecture, arguments and the resized tensors rebuild a pruned network without a pickle."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedpress.core import checksums, consent, limits, own_modules
from fedpress.core.inputs import Inputs, NamedInputs, Shape, shape_told, shapes_in
from fedpress.core.random_source import Source, chance_of
from fedpress.errors import ModelError, SettingError, placing, renaming, suggestion
from fedpress.models import layer_list, memory
from fedpress.models.plain import CNN, MLP
from fedpress.models.resnet import resnet18, resnet_small
from fedpress.nn.folded import apply_folds_
from fedpress.nn.forward_sizes import Numbers, numbers_in, set_numbers_
from fedpress.nn.masked import absorb_masks_
from fedpress.nn.quant_scheme import FILE, QuantizationScheme
from fedpress.nn.quantized import quantize_layers_, register_kept_zeros_
from fedpress.nn.resize import depthwise, replace_, set_groups_, tensor, weight_shape

NO_SPEC = "fedpress wrote no such file: get it anew from where it came"
ARCHITECTURES: dict[str, Any] = {
    "resnet18": resnet18,
    "resnet-small": resnet_small,
    "cnn": CNN,
    "mlp": MLP,
    layer_list.NAME: layer_list.build,
}


class ModelSpec(BaseModel):
    """How to build a model: its architecture and arguments, and what compression changed.

    `architecture` is a row of `ARCHITECTURES` or `package.module:function`. `resized` maps
    the name of every parameter or buffer that pruning changed to its new shape, `numbers` are the sizes in forward
    code that had to change with them, `groups` those of convolutions where shapes do not tell. `sparse` names
    the parameters whose zeros are pruned weights: whoever trains them keeps them zero. `kept_zeros` names those of
    them with a buffer that tells kept entries, which a grid rounded to 0, from pruned ones. `folded` maps a batch norm
    to the layer that took it in, `quantized` a layer to the scheme of its weights and inputs.
    `task` says what the outputs mean where that is more than `class_names` (see `Task.about`).
    `input_shape` and `input_dtype` are those of one example; of several inputs dictionaries by the names of forward's
    arguments.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    arguments: dict[str, JsonValue] = {}
    resized: dict[str, tuple[int, ...]] = {}
    numbers: Numbers = {}
    groups: dict[str, int] = {}
    sparse: tuple[str, ...] = ()
    kept_zeros: tuple[str, ...] = ()
    folded: dict[str, str] = {}
    quantized: dict[str, QuantizationScheme] = {}
    input_shape: Shape
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    task: dict[str, JsonValue] = {}
    input_dtype: Literal["float32", "int64"] | dict[str, Literal["float32", "int64", "bool"]] = (
        "float32"
    )

    @model_validator(mode="after")
    def _same_names(self) -> ModelSpec:
        shapes, dtypes = self.input_shape, self.input_dtype
        several = isinstance(shapes, dict), isinstance(dtypes, dict)
        names = [sorted(table) for table in (shapes, dtypes) if isinstance(table, dict)]
        if any(several) and (not all(several) or names[0] != names[1] or not names[0]):
            raise SettingError(
                f"got {dtypes}, but input_shape is {shapes}: both must name the same inputs",
                place="input_dtype",
                cure="give both as tables with the same names, or neither",
            )
        return self

    def example(self, n: int, chance: Source = None) -> Inputs:
        """Returns `n` examples [n, *input_shape]: zeros, or noise drawn with `chance`; token ids are always zeros.

        Whole numbers among several inputs are ones: they may be lengths or masks, of which 0 leaves nothing.
        """

        def made(shape: tuple[int, ...], dtype: str) -> Tensor:
            if dtype != "float32":
                return torch.zeros(n, *shape, dtype=getattr(torch, dtype))
            if chance is None:
                return torch.zeros(n, *shape)
            return chance_of(chance).normal(n, *shape, dtype=torch.float32)

        if isinstance(self.input_shape, dict):
            assert isinstance(self.input_dtype, dict)
            whole = {name: made(s, self.input_dtype[name]) for name, s in self.input_shape.items()}
            return NamedInputs(
                {k: t if t.is_floating_point() else torch.ones_like(t) for k, t in whole.items()}
            )
        assert isinstance(self.input_dtype, str)
        return made(self.input_shape, self.input_dtype)

    @classmethod
    def of_file(cls, text: str | bytes, allow_code: Collection[str] | str = ()) -> ModelSpec:
        """Reads the JSON of a file, which may come from anybody; nothing is imported, called or allocated for it.

        Args:
            text: of the file.
            allow_code: names `module:function` that it may give as its architecture, besides those that the user of
                this process has named already (see `fedpress.core.consent`).

        Raises:
            ValidationError: of pydantic, if it is no spec.
            ModelError: if its architecture is no row of `ARCHITECTURES` and the user has not allowed it by name, or
                if it declares sizes above `fedpress.core.limits`.
        """
        spec = cls.model_validate_json(text, context={FILE: True})
        if ":" not in spec.architecture:
            _builder(spec.architecture)
        elif spec.architecture not in ARCHITECTURES:
            consent.check(spec.architecture, allow_code, "spec.architecture")
        spec._check_sizes()
        return spec

    def _check_sizes(self) -> None:
        limits.check_tree(self.arguments, "spec.arguments")
        limits.check_tree(self.task, "spec.task", lists=False)
        for name in ("resized", "numbers", "groups", "quantized", "input_shape"):
            limits.check_tree(self.model_dump(include={name})[name], f"spec.{name}", lists=False)
        shapes = shapes_in(self.input_shape)
        if min((size for shape in shapes for size in shape), default=1) < 1:
            raise ModelError(
                f"got {shape_told(self.input_shape)[:80]}, expected sizes above 0",
                place="spec.input_shape",
                cure=NO_SPEC,
            )
        if len(self.mean) != len(self.std) or min(self.std, default=1.0) <= 0:
            raise ModelError(
                "expected as many numbers above 0 as spec.mean has",
                place="spec.std",
                cure=NO_SPEC,
            )
        limits.check("input", sum(prod(shape) for shape in shapes), "spec.input_shape")
        if self.architecture not in ARCHITECTURES:  # a user's function is watched while it builds
            return
        try:
            values = limits.declared(ARCHITECTURES[self.architecture], _arguments(self.arguments))
        except limits.AboveLimit:
            raise
        except Exception:  # arguments that do not fit: building says so, in words that name them
            return
        limits.check("values", values, "spec.arguments")

    def build_within_limits(self) -> nn.Module:
        """Builds a network that a file describes; see `build`.

        Raises:
            ModelError: besides, if it has more values or modules than `fedpress.core.limits` say.
        """
        place = f"spec: '{self.architecture}'"
        with limits.building(place):
            model = self.build()
        if (
            self.architecture in ARCHITECTURES
        ):  # what a user's own function makes may not run without its numbers
            limits.check_running(model, self.example(1), place)
        return model

    def build(self) -> nn.Module:
        """Builds the network with the right shapes and fresh weights.

        Raises:
            ModelError: if the architecture is unknown, its arguments do not fit, or it returns no module; if what
                compression changed belongs to another model.
        """
        model = self.build_dense()
        resize_(model, self.resized)
        _renumber_(model, self.numbers)
        _regroup_(model, self.groups)
        apply_folds_(model, self.folded)
        quantize_layers_(model, self.quantized)
        register_kept_zeros_(model, self.kept_zeros)
        self._keep_zeros()
        return model

    def _keep_zeros(self) -> None:
        for name in self.sparse:
            scheme = self.quantized.get(name.removesuffix(".weight"))
            if scheme is not None and scheme.weights is not None and not scheme.weights.has_zero:
                raise ModelError(
                    f"'{name}' is sparse, but a binary grid has no zero to keep",
                    place="spec",
                    cure="quantize it to ternary instead",
                )

    def build_dense(self) -> nn.Module:
        """Builds the network as its architecture says, before any pruning."""
        return self._dense()[0]

    def take_in(self) -> tuple[ModelSpec, nn.Module]:
        """Builds the network as its user named it, and notes the zeros of the masks that it comes with.

        From now on files may name this architecture too, such as the checkpoints of the same run.
        """
        if self.architecture not in ARCHITECTURES and consent.NAME.fullmatch(self.architecture):
            consent.allow(self.architecture)
        model, masked = self._dense()
        # Files of this model are read within limits: what is above them is told before a long run, not after it.
        values = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        limits.check("values", values, "model")
        limits.check("layers", sum(1 for _ in model.modules()) - 1, "model")
        named = memory.saved_as(self.architecture, self.arguments)
        about = {"architecture": named.architecture, "arguments": named.arguments}
        return self.model_copy(update={"sparse": masked} | about), model

    def _dense(self) -> tuple[nn.Module, tuple[str, ...]]:
        builder = _builder(self.architecture)
        try:
            with renaming({"layers": "spec.arguments.layers"}):
                model = builder(**_arguments(self.arguments))
        except ModelError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise ModelError(
                f"'{self.architecture}' cannot be built: {error}",
                place="spec.arguments",
                cure="give the arguments that it takes",
            ) from error
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"'{self.architecture}' returned {type(model).__name__}",
                place="model",
                cure="return a torch.nn.Module",
            )
        _complete(model)
        return model, absorb_masks_(model)


def _arguments(given: dict[str, JsonValue]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _complete(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"'{name}'" if name else type(model).__name__
        for value in (*module._parameters.values(), *module._buffers.values()):
            if is_lazy(value):
                raise ModelError(
                    f"{where} is a {type(module).__name__}, whose size comes from its first input",
                    place="model",
                    cure="run the model once on an example where it is built",
                )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ModelError(
                (
                    f"{where} has an extra state (get_extra_state), but files of fedpress hold "
                    "tensors alone"
                ),
                place="model",
                cure="keep it in buffers",
            )


def _builder(name: str) -> Any:
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if ":" not in name:
        known = f"use one of {', '.join(ARCHITECTURES)} or 'package.module:function'"
        raise ModelError(
            f"no architecture {name[:80]!r}",
            place="spec.architecture",
            cure=suggestion(name, list(ARCHITECTURES), known),
        )
    try:
        return own_modules.object_of(name)
    except ModelError as error:
        raise ModelError(
            f"cannot load '{name}': {error.problem}", place="spec.architecture", cure=error.cure
        ) from error


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
            raise ModelError(
                f"the model has no tensor '{name}'",
                place="spec.resized",
                cure="the spec is of another model",
            ) from error
        if len(shape) != old.dim() or not all(
            0 < n <= most for n, most in zip(shape, old.shape, strict=True)
        ):
            raise ModelError(
                f"'{name}' of shape {tuple(old.shape)} cannot become {tuple(shape)}",
                place="spec.resized",
                cure="the spec is of another model",
            )
        empty = old.detach().new_zeros(tuple(shape))
        new[name] = (
            nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
        )
    replace_(model, new)


def shapes_that_differ(model: nn.Module, dense: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of `model` that has another shape in `dense`."""
    old = {name: t.shape for name, t in dense.state_dict().items()}
    return {
        n: tuple(t.shape) for n, t in model.state_dict().items() if n in old and t.shape != old[n]
    }


def _renumber_(model: nn.Module, numbers: Numbers) -> None:
    try:
        set_numbers_(model, numbers)
    except AttributeError as error:
        raise ModelError(
            str(error),
            place="spec.numbers",
            cure=(
                "the spec is of another model, or of its code as it was: take the code that "
                "was pruned, or prune again"
            ),
        ) from error


def _regroup_(model: nn.Module, groups: dict[str, int]) -> None:
    for name, count in groups.items():
        module = dict(model.named_modules()).get(name)
        if (
            not isinstance(module, nn.modules.conv._ConvNd)
            or count < 1
            or weight_shape(module)[0] % count
        ):
            raise ModelError(
                f"'{name}' cannot have {count} groups",
                place="spec.groups",
                cure="the spec is of another model",
            )
        set_groups_(module, count)


def what_pruning_changed(model: nn.Module, dense: nn.Module) -> dict[str, Any]:
    """Returns the fields of a spec, `resized`, `numbers` and `groups`, that make `dense` as small as `model`."""
    were = {n: m for n, m in dense.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    now = {
        n: m
        for n, m in model.named_modules()
        if n in were and isinstance(m, nn.modules.conv._ConvNd)
    }
    groups = {
        n: m.groups for n, m in now.items() if m.groups != were[n].groups and not depthwise(were[n])
    }
    return {
        "resized": shapes_that_differ(model, dense),
        "numbers": numbers_in(model),
        "groups": groups,
    }


def save_model(folder: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Writes `model.safetensors` and `spec.json` into `folder`; a shared tensor is written under each of its names."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {n: t.detach().to("cpu", copy=True) for n, t in model.state_dict().items()}
    tensors = {n: t.contiguous() for n, t in copies.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load_model(folder: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of `folder` from its spec and numbers alone.

    Args:
        folder: with `spec.json` and `model.safetensors`.
        allow_code: names `module:function` that the spec may give as its architecture; those of fedpress need none.

    Raises:
        ModelError: if a file is missing or corrupt, the numbers do not fit the spec, or the spec names a function that
            the user has not allowed, or sizes above `fedpress.core.limits`.
    """
    numbers, described = Path(folder) / "model.safetensors", Path(folder) / "spec.json"
    if not Path(folder).exists():
        raise ModelError(
            f"there is no '{folder}'",
            place="model",
            cure="give the folder of a model or of a run, or a packed file",
        )
    for path in (described, numbers):
        if not path.is_file():
            raise ModelError(
                f"no model here ({path.name} is missing)",
                place=folder,
                cure="run the stage again",
            )
    try:
        with placing(described):
            spec = ModelSpec.of_file(described.read_text("utf-8"), allow_code)
    except (ValidationError, UnicodeDecodeError, OSError) as error:
        raise ModelError(
            f"corrupt ({_first_line(error)})", place=described, cure=_anew(folder)
        ) from error
    try:
        tensors = load_file(numbers)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"corrupt ({_first_line(error)})", place=numbers, cure=_anew(folder)
        ) from error
    model = spec.build_within_limits()
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        last = str(error).splitlines()[-1].strip()
        raise ModelError(
            f"model.safetensors does not fit spec.json ({last})",
            place=folder,
            cure=_anew(folder),
        ) from error
    for path in (
        described,
        numbers,
    ):  # of a finished stage; what is plainly wrong has been told more exactly by now
        if fault := checksums.fault(path):
            changed = (
                f"or if you have changed this file yourself, delete '{checksums.list_of(path)}'"
            )
            raise ModelError(
                f"corrupt ({fault})", place=path, cure=f"{_anew(path.parent)}, {changed}"
            )
    return spec, model


def _anew(folder: Path) -> str:
    """What helps where a model's files are damaged."""
    done = Path(folder) / "result.json"
    return (
        f"delete '{done}' to do the stage again"
        if done.exists()
        else "run the stage again, or copy the folder anew"
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return str(error).splitlines()[0]
