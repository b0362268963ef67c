"""The quantize stage: rounds weights and layer inputs to few bits, with or without training."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator
from torch import nn

from fedpress.compress import quantize as quantizing
from fedpress.compress.prune.ignoring import ignored_names
from fedpress.core.inputs import Inputs
from fedpress.core.random import derive
from fedpress.errors import Argument, SettingError
from fedpress.models import ModelSpec
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import (
    kept_entries,
    materialize_,
    note_kept_zeros_,
    qparam_ids,
    quantize_layers_,
    quantized_layers,
)
from fedpress.nn.resize import copied
from fedpress.stages.base import Stage
from fedpress.stages.public import check_public_training, draw_calibration
from fedpress.stages.teaching import SAVED_MODELS, StageTraining, TeacherTrainSettings
from fedpress.tasks import Task, of_model
from fedpress.workspace.drive import drive
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Name, State, Tick

BATCH = 64


class QuantizeStage(TeacherTrainSettings, Stage):
    """`[[stage]] kind = "quantize"`: fewer bits for weights, and for the inputs of layers.

    With `epochs = 0` the network is only rounded (post-training quantization). With one epoch or
    more it is rounded and then trained with quantization in the forward pass (quantization-aware
    training).
    The scales are trained too (learned step size, Esser et al. 2020, arXiv:1902.08153).
    """

    simulates_device: ClassVar = True
    several_inputs: ClassVar = True
    defaults_without_data: ClassVar = {
        "inputs": "dynamic",
        "correct_bias": False,
        "rounding": "nearest",
    }
    saved_models: ClassVar = SAVED_MODELS
    places: ClassVar = {**TeacherTrainSettings.places, "inputs.bits": "input_bits"}

    kind: Literal["quantize"]
    name: Name = "quantize"
    epochs: int = Field(
        0,
        ge=0,
        description="epochs of quantization-aware training; 0: post-training quantization",
    )
    lr: float = Field(
        0.01, gt=0, description="peak learning rate of the quantization-aware training"
    )
    weights: Literal["int", "ternary", "binary", "cluster"] = Field(
        "int",
        description="int: integers times a scale s; ternary: {-s, 0, s}; binary: {-s, s}; cluster: "
        "2^bits values in each layer",
    )
    bits: int = Field(
        8, ge=1, le=8, description="bits of each weight; ternary has 2 and binary 1 in any case"
    )
    # Smaller groups have smaller errors, but each group stores a scale.
    group: int | None = Field(
        None,
        ge=1,
        description="number of weights that share a scale; by default those of an output channel",
    )
    inputs: Literal["static", "dynamic", "float"] | None = Field(
        None,
        description="ranges of the layers' inputs: static (from public examples), dynamic (from "
        "each batch), float (not quantized); by default static for 8-bit int, else float",
    )
    input_bits: int = Field(
        8,
        ge=1,
        le=8,
        description="bits of the layers' inputs; with 1, an input is above or below a threshold "
        "that is learned for its channel",
    )
    keep: tuple[str, ...] | None = Field(
        None,
        description="layers that stay float: names, 'first', 'last'; by default first and last for "
        "ternary and binary, else none",
    )
    ignore: tuple[str, ...] = Field(
        (), description="modules that are not changed: names, * for anything"
    )
    mixed: tuple[int, ...] = Field(
        (), description="bits to choose from for each layer, such as [2, 4, 8], within max_bytes"
    )
    max_bytes: int | None = Field(
        None, ge=1, description="mixed: largest size of all weights and scales, before packing"
    )
    scale: Literal["mse", "minmax"] = Field(
        "mse",
        description="scales of the weights: mse (least squared error) or minmax (the largest "
        "weight is exact)",
    )
    rounding: Literal["nearest", "second-order"] | None = Field(
        None,
        description="nearest, or second-order (GPTQ); by default nearest with epochs or for 8-bit "
        "int, else second-order",
    )
    observer: quantizing.Observer = Field(
        "minmax", description="how the range of a layer's inputs is measured"
    )
    # The correction is exact: the mean error of an output channel is a constant, which its bias can
    # cancel.
    correct_bias: bool = Field(
        True, description="change biases so that the mean output of each layer stays as it was"
    )
    fold: bool | None = Field(
        None,
        description="fold each batch norm into the layer before it; by default for int only, and "
        "not if an earlier stage has clustered weights",
    )
    calibration: int = Field(
        512, ge=1, description="public examples for ranges, rounding and biases"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> QuantizeStage:
        own = {"ternary": 2, "binary": 1}.get(self.weights)
        # The default of `bits` is 8. Only bits that the user has given can be wrong.
        if own is not None and "bits" in self.model_fields_set and self.bits != own:
            raise SettingError(
                f"{self.weights} weights have {own} bits", place="bits", cure="leave bits out"
            )
        # A signed integer of one bit could only be -1 or 0.
        if self.weights == "int" and self.bits < 2:
            raise SettingError(
                f"got {self.bits}, but integers need 2 or more",
                place="bits",
                cure=("give ", Argument("weights", "binary"), " for weights of one bit"),
            )
        if self.weights == "cluster" and self.group is not None:
            raise SettingError(
                "clustered weights have one set of values for a layer, and no groups",
                place="group",
                cure="leave group out",
            )
        return self

    @model_validator(mode="after")
    def _mixed_fits(self) -> QuantizeStage:
        if not self.mixed:
            if self.max_bytes is not None:
                raise SettingError(
                    "it is the budget of mixed bits, and mixed is not given",
                    place="max_bytes",
                    cure=("give ", Argument("mixed", (2, 4, 8)), ", or leave max_bytes out"),
                )
            return self
        if self.weights != "int":
            raise SettingError(
                f"mixed bits are for weights = 'int', not for '{self.weights}'",
                place="mixed",
                cure="leave mixed and max_bytes out",
            )
        # One bit is not an integer grid: it is the kind "binary".
        if not all(2 <= bits <= 8 for bits in self.mixed):
            raise SettingError(
                f"got {list(self.mixed)}, expected bits from 2 to 8",
                place="mixed",
                cure=("try ", Argument("mixed", (2, 4, 8))),
            )
        if self.max_bytes is None:
            raise SettingError(
                "the bits to choose from need a budget",
                place="mixed",
                cure=("give ", Argument("max_bytes", "BYTES")),
            )
        if self.group is not None:
            raise SettingError(
                "mixed bits have one scale for each output channel",
                place="group",
                cure="leave group out",
            )
        return self

    def setting_reading_labels(self) -> str:
        """Returns "epochs" if the stage trains, which needs labels; else ""."""
        return "epochs" if self.epochs else ""

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Quantizes a copy of the model, to find errors before the run.

        The run will quantize the same layers.

        Raises:
            ModelError: if no layer can be quantized.
            RecipeError: if the budget cannot be met.
            DataError: if public examples are needed and there are none.
            TrainingError: if the training settings do not fit.
        """
        ignored_names(state.model, self.ignore)
        if self.epochs:
            check_public_training(state, self)
            self.objective(state, 0)
        if self._looks_at_data():
            drawn = draw_calibration(state, self.calibration, 0)
        model = copied(state.model).to("cpu")
        spec, table, left = self._prepare_(model, state)
        if self.mixed:
            # Without layers, only the outputs of two examples are compared with themselves.
            few = state.data.preprocess(drawn.x[:2])
            quantizing.measure_choices(model, {}, self.mixed, [few], _task(state))
            table = _with_bits(table, self._smallest(model, table))
        quantize_layers_(model, table)
        spec = spec.model_copy(update={"quantized": {**spec.quantized, **table}})
        return replace(state, spec=spec, model=model), _facts(model, table, left)

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Rounds the model, then trains it if `epochs` is above 0; saves after every epoch."""
        seed = derive(state.seed, "stage", folder.index)
        yield Tick(0, 1, "rounding")
        # Rounding needs no gradients, and statistics of batch norms must not change during it.
        model = copied(state.model).to("cpu").eval()
        # Noted before rounding: afterwards a kept weight that rounds to 0 looks like a pruned one.
        kept = kept_entries(model, state.spec.sparse)
        spec, table, left = self._prepare_(model, state)
        batches = self._batches(state, seed)
        if self.mixed:
            # Each layer is measured at all bits, which takes long. Four batches are enough to rank
            # the layers.
            choices = quantizing.measure_choices(
                model, table, self.mixed, batches[:4], _task(state)
            )
            chosen = quantizing.choose_bits(choices, self.max_bytes or 0)
            table = _with_bits(table, chosen)
        notes = quantizing.quantize_(
            model,
            table,
            batches,
            scale=self.scale,
            rounding=self._rounding(),
            observer=self.observer,
            correct_bias=self._corrects(),
        )
        # A kept weight that rounds to 0 is not pruned. It is noted, so that training may change it.
        noted = note_kept_zeros_(model, kept)
        spec = spec.model_copy(
            update={"quantized": {**spec.quantized, **table}, "kept_zeros": noted}
        )
        if self.epochs:
            distillation = self.objective(state, seed, student=model)
            on_grids = replace(state, spec=spec)
            work = StageTraining(model, self, on_grids, seed=seed, distillation=distillation)
            yield from drive(work, folder)
            model = work.fit.result_()
        model = materialize_(model.to("cpu"))
        spec = spec.model_copy(update={"kept_zeros": note_kept_zeros_(model, kept)})
        layers: list[JsonValue] = []
        for name, layer in quantized_layers(model):
            # Layers that an earlier stage quantized are not in this stage's table.
            if name in table:
                bits = _bits(table[name])
                layers.append({"name": name, "weights": layer.size, "bits": bits})
        folder.record(quantized=layers)
        facts = _facts(model, table, left)
        if notes:
            facts["notes"] = notes
        return replace(state, spec=spec, model=model, facts=facts)

    def _prepare_(
        self, model: nn.Module, state: State
    ) -> tuple[ModelSpec, dict[str, QuantizationScheme], dict[str, str]]:
        """Folds batch norms into the layers before them, and chooses the layers to quantize.

        Returns:
            The spec with the folded norms; a dictionary of layer -> how it is quantized; and a
            dictionary of name -> why a layer stays float or a norm is not folded.
        """
        spec = state.spec
        left: dict[str, str] = {}
        # Layers whose weights an earlier stage has clustered to a few shared values.
        shared = {}
        for name, scheme in spec.quantized.items():
            if scheme.weights and scheme.weights.kind == "codebook":
                shared[name] = scheme.weights
        fold = self.fold
        if fold is None:
            # Folding scales each output channel on its own, so a few shared values would become
            # many different ones.
            fold = self.weights == "int" and not shared
        if fold:
            folds, unfolded = quantizing.find_folds(model, state.example(2), ignore=self.ignore)
            quantizing.fold_(model, folds)
            spec = spec.model_copy(update={"folded": {**spec.folded, **folds}})
            left |= {name: f"not folded: {why}" for name, why in unfolded.items()}
        keep = self.keep
        if keep is None:
            # At one or two bits, quantizing the first and last layer costs most of the accuracy.
            keep = ("first", "last") if self.weights in ("ternary", "binary") else ()
        table, floats = quantizing.quantizable(
            model, self._scheme(), keep=keep, ignore=self.ignore, sparse=spec.sparse
        )
        if self.weights == "int":
            # Clustered weights stay clustered: their centroids are rounded to integers.
            for name, codebook in shared.items():
                if name in table:
                    weights = codebook.model_copy(update={"centroid_bits": self.bits})
                    table[name] = table[name].model_copy(update={"weights": weights})
        return spec, table, left | floats

    def _scheme(self) -> QuantizationScheme:
        """Returns how layers are quantized: kind, bits and groups of weights, and bits of inputs.

        With mixed bits, the bits of each layer are set later.
        """
        weights: dict[str, Any] = {
            "kind": "codebook" if self.weights == "cluster" else self.weights,
            "group": self.group,
        }
        if self.weights not in ("ternary", "binary"):
            weights["bits"] = self.bits
        mode = self.inputs
        if mode is None:
            # Runtimes have integer kernels for 8 bits. With fewer bits only the file gets smaller.
            mode = "static" if self.weights == "int" and self.bits == 8 else "float"
        inputs = None
        if mode != "float":
            inputs = InputQuantization(bits=self.input_bits, dynamic=mode == "dynamic")
        return QuantizationScheme(weights=WeightQuantization.model_validate(weights), inputs=inputs)

    def _rounding(self) -> Literal["nearest", "second-order"]:
        """Returns the rounding in the settings, or the default for these bits."""
        if self.rounding is not None:
            return self.rounding
        # Second-order rounding takes longer. It is not worth it at 8 bits, where errors are small,
        # nor before a training, which corrects them.
        few_bits = self.weights != "int" or self.bits < 8 or bool(self.mixed)
        return "second-order" if few_bits and not self.epochs else "nearest"

    def _corrects(self) -> bool:
        # The training corrects the biases anyway.
        return self.correct_bias and not self.epochs

    def _looks_at_data(self) -> bool:
        """Whether public examples are needed: for ranges, mixed bits, biases or rounding."""
        inputs = self._scheme().inputs
        ranges = inputs is not None and inputs.calibrated
        return ranges or bool(self.mixed) or self._corrects() or self._rounding() == "second-order"

    def _smallest(self, model: nn.Module, table: dict[str, QuantizationScheme]) -> dict[str, int]:
        """Returns the smallest of the `mixed` bits for each layer.

        Raises:
            RecipeError: if the model exceeds `max_bytes` even with the smallest bits.
        """
        choices: dict[str, list[quantizing.BitChoice]] = {}
        for name in table:
            layer = model.get_submodule(name)
            choices[name] = []
            for bits in self.mixed:
                size = quantizing.layer_bytes(layer, _int_weights(bits))
                # The error of the outputs is not known yet; only the bytes matter here.
                choices[name].append(quantizing.BitChoice(bits, size, 0.0))
        quantizing.choose_bits(choices, self.max_bytes or 0)
        return dict.fromkeys(table, min(self.mixed))

    def _batches(self, state: State, seed: int) -> list[Inputs]:
        if not self._looks_at_data():
            return []
        drawn = draw_calibration(state, self.calibration, seed)
        return [state.data.preprocess(x) for x in drawn.x.split(BATCH)]


def _task(state: State) -> Task | None:
    """Returns what the model's outputs mean; None if neither data nor model say it."""
    if state.data.labelled:
        return state.data.task
    spec = state.spec
    # Inputs without labels have no task, but a saved model has that of its training.
    return of_model(spec.task, spec.class_names) if spec.task or spec.class_names else None


def _with_bits(
    table: dict[str, QuantizationScheme], chosen: dict[str, int]
) -> dict[str, QuantizationScheme]:
    return {
        name: scheme.model_copy(update={"weights": _int_weights(chosen[name])})
        for name, scheme in table.items()
    }


def _int_weights(bits: int) -> WeightQuantization:
    return WeightQuantization.model_validate({"bits": bits})


def _bits(scheme: QuantizationScheme) -> int:
    return scheme.weights.bits if scheme.weights is not None else 32


def _stays_float(model: nn.Module) -> tuple[float, list[str]]:
    """Returns the share of parameters that stay float, and the three modules with the most of them.

    Scales and codebooks are not counted at all: they belong to the quantized weights.
    """
    quantized = set()
    for _, layer in quantized_layers(model):
        if layer.scheme.weights:
            quantized |= {id(getattr(layer, key)) for key in layer.keys}
    qparams = qparam_ids(model)
    sizes: dict[str, int] = {}
    total = 0
    for name, p in model.named_parameters():
        if id(p) in qparams:
            continue
        total += p.numel()
        if id(p) not in quantized:
            owner = name.rpartition(".")[0] or name
            sizes[owner] = sizes.get(owner, 0) + p.numel()
    order = sorted(sizes, key=lambda name: -sizes[name])
    return sum(sizes.values()) / max(1, total), order[:3]


def _facts(
    model: nn.Module, table: dict[str, QuantizationScheme], left: dict[str, str]
) -> dict[str, Any]:
    """Returns the entries of the stage's result, such as the mean number of bits per weight."""
    sizes = {name: layer.size for name, layer in quantized_layers(model) if name in table}
    total = sum(sizes.values())
    all_bits = sum(_bits(table[name]) * size for name, size in sizes.items())
    share, names = _stays_float(model)
    return {
        "float_share": share,
        "mostly_float": names,
        "bits_per_weight": all_bits / max(1, total),
        "quantized_layers": len(sizes),
        "left": left,
    }
