"""`ModelSpec`: describes a compressed network as JSON, from which the network is built again.

The spec is saved beside the tensors. Unlike a pickle, it can be read without running code.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256
from itertools import chain
from math import prod
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedpress.core import consent, limits, own_modules
from fedpress.core.inputs import Inputs, NamedInputs, Shape, shape_text, shapes_in
from fedpress.core.random_source import Source, as_random_source
from fedpress.core.settings import SETTINGS
from fedpress.errors import ModelError, SettingError, renaming, suggestion
from fedpress.models import layer_list, memory
from fedpress.models.column_sums import ColumnSums
from fedpress.models.plain import CNN, MLP
from fedpress.models.pruned import resize_, set_groups_of_spec_, set_numbers_of_spec_
from fedpress.models.resnet import resnet18, resnet_small
from fedpress.nn.folded import apply_folds_
from fedpress.nn.forward_sizes import Numbers
from fedpress.nn.masked import absorb_masks_
from fedpress.nn.quant_scheme import FILE, QuantizationScheme
from fedpress.nn.quantized import quantize_layers_, register_kept_zeros_

# Advice of errors about values that no spec of fedpress has: the file is damaged or malicious.
NO_SPEC = "fedpress wrote no such file: copy it again from its source"
COLUMN_SUMS = "column-sums"
"""Name of the query of a stage `statistics`."""
ARCHITECTURES: dict[str, Any] = {
    "resnet18": resnet18,
    "resnet-small": resnet_small,
    "cnn": CNN,
    "mlp": MLP,
    layer_list.NAME: layer_list.build,
    # No network to be trained: the query of a stage `statistics`.
    COLUMN_SUMS: ColumnSums,
}
"""Name in a spec -> class or function that builds the network."""
NETWORKS = [name for name in ARCHITECTURES if name != COLUMN_SUMS]
"""Names that a recipe may give."""
DATA_SIZES = ("in_features", "in_channels", "image_size", "num_classes")
"""Arguments of `ARCHITECTURES` that follow from the data if a recipe leaves them out."""

STRUCTURE = (
    "architecture",
    "arguments",
    "resized",
    "numbers",
    "groups",
    "sparse",
    "kept_zeros",
    "folded",
    "quantized",
)
"""Fields of a spec that say how the network is built. The other fields describe inputs and task."""


# Largest number of specs in `_RUN_WITHIN_LIMITS`, to bound the memory of a long-running process. A
# spec that is dropped is checked once more.
MOST_REMEMBERED = 1000
_RUN_WITHIN_LIMITS: set[tuple[Any, tuple[int, ...], bytes]] = set()
"""Specs whose networks are known to run within the limits, as (builder, limits, digest)."""


class ModelSpec(BaseModel):
    """How to build a model: its architecture and arguments, and what compression changed.

    Attributes:
        architecture: a key of `ARCHITECTURES`, or `package.module:function`.
        arguments: arguments of the architecture, such as {"num_classes": 10}.
        resized: name of each parameter or buffer that pruning made smaller -> its new shape.
        numbers: sizes in forward code, such as the 4 in `view(n, 4, 8)`, that pruning changed.
        groups: name of a convolution -> its number of groups, if shapes do not imply the number.
        sparse: names of parameters whose zeros are pruned weights; training keeps these zeros.
        kept_zeros: names of quantized parameters in `sparse` with kept zeros: values that pruning
            kept, but that quantization rounded to 0. A buffer marks these values.
        folded: name of a batch norm -> name of the layer into which it was folded.
        quantized: name of a layer -> how its weights and inputs are quantized.
        input_shape: shape of one example; for several inputs {argument of forward: shape}.
        mean: mean of each input channel, for the standardisation. Empty: no standardisation.
        std: standard deviation of each input channel.
        class_names: names of the classes of a classification.
        task: kind and options of the task, such as regression with mean and std, as `Task.to_json`
            returns them. Empty for classification, which needs only `class_names`.
        input_dtype: dtype of one example; for several inputs {argument of forward: dtype}.
        preparation: how raw data, such as a row of a table, become an example, as
            `Preparation.to_json` returns it. Empty if the data do not say it.
    """

    model_config = SETTINGS

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
    preparation: dict[str, JsonValue] = {}

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out an empty preparation, so that older versions can read the file."""
        found: dict[str, Any] = write(self)
        if not found.get("preparation"):
            found.pop("preparation", None)
        return found

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

    @property
    def own_task(self) -> str:
        """The class of the user's own task, as `module:Class`; "" for a task of fedpress."""
        kind = str(self.task.get("kind", ""))
        return kind if ":" in kind else ""

    def example(self, n: int, chance: Source = None) -> Inputs:
        """Returns `n` artificial examples [n, *input_shape] to run the network on.

        Args:
            n: number of examples.
            chance: random source of normally distributed float inputs. None: float inputs are 0.

        Returns:
            The examples. A single input of integers is 0, because every embedding has the token id
            0. With several inputs, integers and bools are 1: they may be lengths or masks, and with
            0 the network would ignore the example.
        """

        def floats_or_zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
            if dtype != "float32":
                return torch.zeros(n, *shape, dtype=getattr(torch, dtype))
            if chance is None:
                return torch.zeros(n, *shape)
            return as_random_source(chance).normal(n, *shape, dtype=torch.float32)

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
        """Reads the JSON of an untrusted file. Nothing is imported, called or built.

        Args:
            text: content of the file.
            allow_code: functions, as `module:function`, that the file may name as its architecture.
                or the class that it may name as its task. Those that the user of this process has
                already named are allowed too (see `fedpress.core.consent`).

        Raises:
            ValidationError: (of pydantic) if the text is not a spec.
            ModelError: if the architecture is neither in `ARCHITECTURES` nor allowed, if a task of
                the user's own is not allowed, or if the declared sizes exceed `fedpress.core.limits`.
        """
        spec = cls.model_validate_json(text, context={FILE: True})
        if ":" not in spec.architecture:
            _builder(spec.architecture)  # raises an error if there is no such architecture
        elif spec.architecture not in ARCHITECTURES:
            consent.check(spec.architecture, allow_code, "spec.architecture")
        # The task's code is not called here, but whoever opens the model asks for its predictions.
        if spec.own_task:
            consent.check(spec.own_task, allow_code, "spec.task.kind")
        spec._check_sizes()
        return spec

    def _check_sizes(self) -> None:
        """Checks the declared sizes against `fedpress.core.limits` before memory is allocated."""
        limits.check_tree(self.arguments, "spec.arguments")
        limits.check_tree(self.task, "spec.task", lists=False)
        limits.check_tree(self.preparation, "spec.preparation", lists=False)
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
                "expected numbers above 0, one for each number of spec.mean",
                place="spec.std",
                cure=NO_SPEC,
            )
        limits.check("input", sum(prod(shape) for shape in shapes), "spec.input_shape")
        # The size of a user's own network is unknown before it is built, so it is checked
        # afterwards.
        if self.architecture not in ARCHITECTURES:
            return
        # Counted without allocating memory for the weights.
        try:
            values = limits.count_values(
                ARCHITECTURES[self.architecture], _arguments(self.arguments)
            )
        except limits.AboveLimit:
            raise
        # The arguments do not fit. The user sees this error when the network is built.
        except Exception:
            return
        limits.check("values", values, "spec.arguments")

    def build_within_limits(self) -> nn.Module:
        """Builds a network that an untrusted file describes; see `build`.

        Raises:
            ModelError: for the same reasons as `build`; or if the network has more values or
                modules than `fedpress.core.limits` allows.
        """
        place = f"spec: '{self.architecture}'"
        with limits.limited_building(place):
            model = self.build()
        # A user's own network is not run here: it may fail before its weights are loaded.
        if self.architecture in ARCHITECTURES:
            self._check_activations(model, place)
        return model

    def _check_activations(self, model: nn.Module, place: str) -> None:
        """Checks the sizes of all activations, unless this spec was checked before."""
        # Checked once: a run loads the same network many times, and the sizes follow from the spec
        # alone.
        text = self.model_dump_json().encode()
        builder = ARCHITECTURES[self.architecture]
        key = (builder, limits.all_limits(), sha256(text).digest())
        if key in _RUN_WITHIN_LIMITS:
            return
        limits.check_activations(model, self.example(1), place)
        if len(_RUN_WITHIN_LIMITS) >= MOST_REMEMBERED:
            _RUN_WITHIN_LIMITS.clear()
        _RUN_WITHIN_LIMITS.add(key)

    def build(self) -> nn.Module:
        """Builds the network with the shapes after compression, and with new weights.

        Raises:
            ModelError: if the architecture is unknown, if its arguments do not fit, if it returns
                no module, or if a field such as `resized` names a tensor that the network lacks.
        """
        model = self.build_dense()
        # Shapes come first, because folds and quantizers need the pruned layers.
        resize_(model, self.resized)
        set_numbers_of_spec_(model, self.numbers)
        set_groups_of_spec_(model, self.groups)
        apply_folds_(model, self.folded)
        quantize_layers_(model, self.quantized)
        register_kept_zeros_(model, self.kept_zeros)
        self._check_sparse_has_zero()
        return model

    def _check_sparse_has_zero(self) -> None:
        # The binary grid is {-scale, scale}.
        for name in self.sparse:
            scheme = self.quantized.get(name.removesuffix(".weight"))
            if scheme is not None and scheme.weights is not None and not scheme.weights.has_zero:
                raise ModelError(
                    f"'{name}' is sparse, but binary weights cannot be 0",
                    place="spec",
                    cure="quantize it to ternary instead",
                )

    def build_dense(self) -> nn.Module:
        """Builds the network as before any compression."""
        return self._build_without_masks()[0]

    def build_for_user(self) -> tuple[ModelSpec, nn.Module]:
        """Builds the network that the user of this process has named.

        By naming the architecture, the user has consented to call it. From now on files of this
        process, such as checkpoints of the same run, may name it too.

        Returns:
            The spec to save in files, and the network. Masks of torch's pruning are multiplied into
            the weights, and the names of these weights are in `sparse` of the spec.

        Raises:
            ModelError: for the same reasons as `build`; or if saved files of the network would
                exceed `fedpress.core.limits`.
        """
        if self.architecture not in ARCHITECTURES and consent.NAME.fullmatch(self.architecture):
            consent.allow(self.architecture)
        model, masked = self._build_without_masks()
        # Files of this model could not be loaded if they exceed the limits. It is better to fail
        # now than after a long run.
        values = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        limits.check("values", values, "model")
        limits.check("layers", sum(1 for _ in model.modules()) - 1, "model")
        named = memory.buildable_for_files(self.architecture, self.arguments)
        changed: dict[str, Any] = {
            "sparse": masked,
            "architecture": named.architecture,
            "arguments": named.arguments,
        }
        earlier = memory.held_spec(self.architecture, self.arguments)
        if earlier is not None:  # the module is the result of an earlier call
            changed = {name: getattr(earlier, name) for name in STRUCTURE}
            changed["sparse"] = tuple(dict.fromkeys((*earlier.sparse, *masked)))
        return self.model_copy(update=changed), model

    def _build_without_masks(self) -> tuple[nn.Module, tuple[str, ...]]:
        """Builds the network, with masks multiplied into weights; returns the masked names too."""
        builder = _builder(self.architecture)
        try:
            # The errors of an architecture name its own arguments; the user sees keys of the spec.
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
    """Returns the arguments with lists turned into tuples, since JSON has no tuples."""
    found: dict[str, Any] = {}
    for key, value in arguments.items():
        found[key] = tuple(value) if isinstance(value, list) else value
    return found


def _check_complete(model: nn.Module) -> None:
    """Checks that a saved file can hold the whole state of the network.

    Raises:
        ModelError: if a tensor has no size yet (lazy modules), or a module has an extra state.
    """
    for name, module in model.named_modules():
        where = f"'{name}'" if name else type(model).__name__
        for value in (*module._parameters.values(), *module._buffers.values()):
            if is_lazy(value):
                raise ModelError(
                    f"{where} is a {type(module).__name__}, whose size comes from its first input",
                    place="model",
                    cure="run the model once on an example in the function that builds it",
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
        known = f"use one of {', '.join(NETWORKS)} or 'package.module:function'"
        raise ModelError(
            f"no architecture {name[:80]!r}",
            place="spec.architecture",
            cure=suggestion(name, NETWORKS, known),
        )
    try:
        return own_modules.object_of(name)
    except ModelError as error:
        raise ModelError(
            f"cannot load '{name}': {error.problem}", place="spec.architecture", cure=error.cure
        ) from error
