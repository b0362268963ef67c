"""`ModelSpec`: the JSON from which a compressed network is built again, without a pickle."""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from itertools import chain
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
from fedpress.core.inputs import Inputs, NamedInputs, Shape, shape_text, shapes_in
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
from fedpress.nn.resize import get_tensor, is_depthwise, replace_tensors_, set_groups_, weight_shape

NO_SPEC = "fedpress wrote no such file: get it anew from where it came"
ARCHITECTURES: dict[str, Any] = {
    "resnet18": resnet18,
    "resnet-small": resnet_small,
    "cnn": CNN,
    "mlp": MLP,
    layer_list.NAME: layer_list.build,
}


MOST_REMEMBERED = 1000
_RUN_WITHIN_LIMITS: set[tuple[Any, tuple[int, ...], bytes]] = set()
"""Builder, limits and digest of specs whose networks are known to run within the limits."""


class ModelSpec(BaseModel):
    """How to build a model: its architecture and arguments, and what compression changed.

    Attributes:
        architecture: a row of `ARCHITECTURES`, or `package.module:function`.
        arguments: of the architecture.
        resized: name of each parameter or buffer that pruning made smaller -> its new shape.
        numbers: sizes in forward code, such as `view(n, 4, 8)`, that had to change with them.
        groups: number of groups of convolutions, where the shapes do not tell it.
        sparse: parameters whose zeros are pruned weights; training keeps them zero.
        kept_zeros: those of them that are quantized and have a buffer that tells pruned weights
            from kept ones that were rounded to 0.
        folded: batch norm -> the layer that it was folded into.
        quantized: layer -> quantization scheme of its weights and inputs.
        input_shape: shape of one example; for several inputs a dictionary by argument of forward.
        mean: of each input channel, for the standardisation of examples; empty: none.
        std: likewise.
        class_names: of a classification.
        task: meaning of the outputs where it is more than `class_names` (see `Task.to_json`).
        input_dtype: of one example; for several inputs a dictionary by argument of forward.
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
        if not isinstance(shapes, dict) and not isinstance(dtypes, dict):
            return self
        both = isinstance(shapes, dict) and isinstance(dtypes, dict)
        if not both or not shapes or sorted(shapes) != sorted(dtypes):
            raise SettingError(
                f"got {dtypes}, but input_shape is {shapes}: both must name the same inputs",
                place="input_dtype",
                cure="give both as tables with the same names, or neither",
            )
        return self

    def example(self, n: int, chance: Source = None) -> Inputs:
        """Returns `n` examples [n, *input_shape] to run the network on.

        Args:
            n: how many.
            chance: random source of normal noise; None: zeros.

        Returns:
            Floats as above; a single integer input is always 0, since ids of tokens must be small.
            Integers and bools among several inputs are 1: they may be lengths or masks, and with 0
            nothing would be left of an example.
        """

        def floats_or_zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
            if dtype != "float32":
                return torch.zeros(n, *shape, dtype=getattr(torch, dtype))
            if chance is None:
                return torch.zeros(n, *shape)
            return chance_of(chance).normal(n, *shape, dtype=torch.float32)

        if isinstance(self.input_shape, dict):
            assert isinstance(self.input_dtype, dict)
            inputs: dict[str, Tensor] = {}
            for name, shape in self.input_shape.items():
                made = floats_or_zeros(shape, self.input_dtype[name])
                inputs[name] = made if made.is_floating_point() else torch.ones_like(made)
            return NamedInputs(inputs)
        assert isinstance(self.input_dtype, str)
        return floats_or_zeros(self.input_shape, self.input_dtype)

    @classmethod
    def of_file(cls, text: str | bytes, allow_code: Collection[str] | str = ()) -> ModelSpec:
        """Reads the JSON of a file that may come from anybody.

        Nothing is imported, called or allocated for it.

        Args:
            text: of the file.
            allow_code: functions, as `module:function`, that it may name as its architecture,
                besides those that the user of this process has already named (see
                `fedpress.core.consent`).

        Raises:
            ValidationError: of pydantic, if it is no spec.
            ModelError: if its architecture is no row of `ARCHITECTURES` and not allowed, or if it
                declares sizes above `fedpress.core.limits`.
        """
        spec = cls.model_validate_json(text, context={FILE: True})
        if ":" not in spec.architecture:
            _builder(spec.architecture)
        elif spec.architecture not in ARCHITECTURES:
            consent.check(spec.architecture, allow_code, "spec.architecture")
        spec._check_sizes()
        return spec

    def _check_sizes(self) -> None:
        """Checks the declared sizes against `fedpress.core.limits` before memory is allocated."""
        limits.check_tree(self.arguments, "spec.arguments")
        limits.check_tree(self.task, "spec.task", lists=False)
        for name in ("resized", "numbers", "groups", "quantized", "input_shape"):
            limits.check_tree(self.model_dump(include={name})[name], f"spec.{name}", lists=False)
        shapes = shapes_in(self.input_shape)
        if any(size < 1 for size in chain(*shapes)):
            raise ModelError(
                f"got {shape_text(self.input_shape)[:80]}, expected sizes above 0",
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
        # The size of a user's own network is not known before it is built: that is then watched.
        if self.architecture not in ARCHITECTURES:
            return
        try:
            values = limits.declared(ARCHITECTURES[self.architecture], _arguments(self.arguments))
        except limits.AboveLimit:
            raise
        # Arguments that do not fit: the error of building names them.
        except Exception:
            return
        limits.check("values", values, "spec.arguments")

    def build_within_limits(self) -> nn.Module:
        """Builds a network that a file describes; see `build`.

        Raises:
            ModelError: as `build`, and if it has more values or modules than
                `fedpress.core.limits` allow.
        """
        place = f"spec: '{self.architecture}'"
        with limits.building(place):
            model = self.build()
        # A user's own network may not run before its weights are loaded.
        if self.architecture in ARCHITECTURES:
            self._check_running(model, place)
        return model

    def _check_running(self, model: nn.Module, place: str) -> None:
        """Checks the sizes of all activations; once for all files with the same spec."""
        # A run loads the same network many times, and the sizes follow from the spec alone.
        text = self.model_dump_json().encode()
        builder = ARCHITECTURES[self.architecture]
        key = (builder, limits.all_limits(), sha256(text).digest())
        if key in _RUN_WITHIN_LIMITS:
            return
        limits.check_running(model, self.example(1), place)
        if len(_RUN_WITHIN_LIMITS) >= MOST_REMEMBERED:
            _RUN_WITHIN_LIMITS.clear()
        _RUN_WITHIN_LIMITS.add(key)

    def build(self) -> nn.Module:
        """Builds the network with the right shapes and fresh weights.

        Raises:
            ModelError: if the architecture is unknown, its arguments do not fit, or it returns no
                module; or if what compression changed belongs to another model.
        """
        model = self.build_dense()
        # Shapes first: folds and quantizers are made for the layers as they were pruned.
        resize_(model, self.resized)
        _set_numbers_(model, self.numbers)
        _set_groups_(model, self.groups)
        apply_folds_(model, self.folded)
        quantize_layers_(model, self.quantized)
        register_kept_zeros_(model, self.kept_zeros)
        self._check_sparse_has_zero()
        return model

    def _check_sparse_has_zero(self) -> None:
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
        return self._build_without_masks()[0]

    def build_for_user(self) -> tuple[ModelSpec, nn.Module]:
        """Builds the network that the user of this process has named, with zeros for its masks.

        It has the user's consent, so files may name its architecture from now on, such as the
        checkpoints of the same run.

        Returns:
            The spec as files get it, with the masked parameters as `sparse`, and the network.

        Raises:
            ModelError: as `build`, and if files of the network could not be read within limits.
        """
        if self.architecture not in ARCHITECTURES and consent.NAME.fullmatch(self.architecture):
            consent.allow(self.architecture)
        model, masked = self._build_without_masks()
        # The files of this model will be read within limits: better to fail now than after a long
        # run.
        values = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        limits.check("values", values, "model")
        limits.check("layers", sum(1 for _ in model.modules()) - 1, "model")
        named = memory.saved_as(self.architecture, self.arguments)
        changed = {
            "sparse": masked,
            "architecture": named.architecture,
            "arguments": named.arguments,
        }
        return self.model_copy(update=changed), model

    def _build_without_masks(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Builds the network with masks multiplied into weights; returns the masked names too."""
        builder = _builder(self.architecture)
        try:
            with renaming({name: f"spec.arguments.{name}" for name in ("layers", "norm")}):
                model = builder(**_arguments(self.arguments))
        except ModelError:
            raise
        # A user's function may raise anything.
        except Exception as error:
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
        _check_complete(model)
        return model, absorb_masks_(model)


def _arguments(arguments: dict[str, JsonValue]) -> dict[str, Any]:
    """Returns the arguments with tuples in place of lists, since JSON has no tuples."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def _check_complete(model: nn.Module) -> None:
    """Checks that the tensors in `state_dict` are all that a file must hold of the network."""
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
    """Replaces parameters and buffers by zeros of smaller shapes, and updates the layers' sizes.

    Args:
        model: the network.
        shapes: new shapes, by the name of the parameter or buffer.

    Raises:
        ModelError: if a name is not in the model, or a shape is larger than that of its tensor.
    """
    new: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        try:
            old = get_tensor(model, name)
        except AttributeError as error:
            raise ModelError(
                f"the model has no tensor '{name}'",
                place="spec.resized",
                cure="the spec is of another model",
            ) from error
        fits = len(shape) == old.dim() and all(
            0 < size <= most for size, most in zip(shape, old.shape, strict=True)
        )
        if not fits:
            raise ModelError(
                f"'{name}' of shape {tuple(old.shape)} cannot become {tuple(shape)}",
                place="spec.resized",
                cure="the spec is of another model",
            )
        new[name] = old.detach().new_zeros(tuple(shape))
        if isinstance(old, nn.Parameter):
            new[name] = nn.Parameter(new[name], old.requires_grad)
    replace_tensors_(model, new)


def shapes_that_differ(model: nn.Module, dense: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of `model` that has another shape in `dense`."""
    old = {name: t.shape for name, t in dense.state_dict().items()}
    found = {}
    for name, value in model.state_dict().items():
        if name in old and value.shape != old[name]:
            found[name] = tuple(value.shape)
    return found


def _set_numbers_(model: nn.Module, numbers: Numbers) -> None:
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


def _set_groups_(model: nn.Module, groups: dict[str, int]) -> None:
    modules = dict(model.named_modules())
    for name, count in groups.items():
        module = modules.get(name)
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
    """Returns `resized`, `numbers` and `groups` of the spec that prunes `dense` to `model`."""
    old = _convolutions(dense)
    groups = {}
    for name, module in _convolutions(model).items():
        # A depthwise convolution has as many groups as channels, which its shape tells.
        if name in old and module.groups != old[name].groups and not is_depthwise(old[name]):
            groups[name] = module.groups
    return {
        "resized": shapes_that_differ(model, dense),
        "numbers": numbers_in(model),
        "groups": groups,
    }


def _convolutions(model: nn.Module) -> dict[str, nn.modules.conv._ConvNd]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}


def save_model(folder: Path, spec: ModelSpec, model: nn.Module) -> None:
    """Writes `model.safetensors` and `spec.json` into `folder`.

    A tensor that several layers share is written under each of its names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, value in model.state_dict().items():
        # Copied, since safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "spec.json").write_text(spec.model_dump_json(indent=1) + "\n")


def load_model(folder: Path, allow_code: Collection[str] | str = ()) -> tuple[ModelSpec, nn.Module]:
    """Rebuilds the model of `folder` from its spec and tensors.

    Args:
        folder: with `spec.json` and `model.safetensors`.
        allow_code: functions, as `module:function`, that the spec may name as its architecture;
            architectures of fedpress need no entry.

    Raises:
        ModelError: if a file is missing or corrupt, the tensors do not fit the spec, or the spec
            names a function that is not allowed or sizes above `fedpress.core.limits`.
    """
    spec_file, tensor_file = Path(folder) / "spec.json", Path(folder) / "model.safetensors"
    if not Path(folder).exists():
        raise ModelError(
            f"there is no '{folder}'",
            place="model",
            cure="give the folder of a model or of a run, or a packed file",
        )
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
    # Last, since the errors above tell more exactly what is wrong with a file.
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
    """Returns the cure for damaged files of a model."""
    done = Path(folder) / "result.json"
    if done.exists():
        return f"delete '{done}' to do the stage again"
    return "run the stage again, or copy the folder anew"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
    return str(error).splitlines()[0]
