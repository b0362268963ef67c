"""The export stage: writes a file for a device, runs it, and compares it with the torch model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, field_validator, model_validator
from torch import Tensor, nn

from fedpress import deploy
from fedpress.core.inputs import Inputs
from fedpress.core.random_source import public_stream
from fedpress.core.settings import SETTINGS
from fedpress.deploy import FORMATS, Artifact, Job, RawColumns
from fedpress.deploy.examples import InputSpec
from fedpress.errors import Argument, DataError, SettingError
from fedpress.nn.observers import Observer
from fedpress.stages import inputs
from fedpress.stages.base import DIFFERENCES, Stage
from fedpress.tasks import Task, description
from fedpress.workspace.stage_folder import StageFolder
from fedpress.workspace.state import Name, State, Tick

BATCH = 64
"""Number of examples in a batch when the ranges of layer inputs are measured."""
MAX_OUTPUT_ERROR = 0.02
"""Larger relative errors of the outputs, |file - model| / |model|, are mentioned in the result."""
MAX_METRIC_CHANGE = 0.005
"""Larger changes of the metric are mentioned in the result. It is 0.5 percentage points of a metric
that is a share, such as accuracy, and 0.5% of any other metric, such as an error in euros."""


class ExportStage(BaseModel, Stage):
    """`[[stage]] kind = "export"`: writes a file that a device runs, and compares it with torch."""

    changes_model: ClassVar = False
    reports_artifact: ClassVar = True
    several_inputs: ClassVar = True

    model_config = SETTINGS

    kind: Literal["export"]
    name: Name = "export"
    format: str = Field("onnx", description=f"one of {', '.join(FORMATS)}")
    int8: bool = Field(
        False, description="compute with 8-bit integers; layers that are still float are quantized"
    )
    weight_bits: Literal[7, 8] = Field(
        8,
        description="int8: bits of the weights that int8 quantizes; 7 is faster on processors with "
        "AVX2 but no VNNI",
    )
    observer: Observer = Field(
        "minmax", description="int8: how the range of each layer's inputs is measured"
    )
    calibration: int = Field(
        256, ge=1, description="int8: public examples on which ranges are measured"
    )
    preparation: Literal["beside", "inside"] = Field(
        "beside",
        description="ONNX: with inside, the file takes raw columns of a table, and fills, encodes "
        "and standardises them itself",
    )
    parity_examples: int = Field(
        256, ge=1, description="test examples on which the file is compared with the torch model"
    )

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, name: str) -> str:
        if name not in FORMATS:
            raise SettingError.of(deploy.unknown_format(name))
        return name

    @model_validator(mode="after")
    def _seven_bits_need_int8(self) -> ExportStage:
        if self.weight_bits == 7 and not self.int8:
            raise SettingError(
                "7 bits are for weights that int8 quantizes, and int8 is false",
                place="weight_bits",
                cure=("give ", Argument("int8", True), ", or leave weight_bits out"),
            )
        return self

    @model_validator(mode="after")
    def _onnx_prepares_inside(self) -> ExportStage:
        if self.preparation == "inside" and self.format != "onnx":
            raise SettingError(
                f"files of {self.format} take no words, so they cannot prepare raw columns",
                place="preparation",
                cure=("give ", Argument("format", "onnx"), ", or leave preparation out"),
            )
        return self

    def check(self, state: State) -> tuple[State, dict[str, Any]]:
        """Exports the untrained model to a temporary file, to find errors before the run.

        Raises:
            ExportError: if the model cannot be exported, or packages are missing.
            DataError: if int8 is set and there are no public examples to measure ranges on.
        """
        with tempfile.TemporaryDirectory() as folder:
            artifact = self._export(
                state, Path(folder) / f"model{FORMATS[self.format].suffix}", few=True
            )
        return state, {
            "format": self.format,
            "file_bytes": artifact.file_bytes,
            "left_float": artifact.left_float,
        }

    def run(self, state: State, folder: StageFolder) -> Generator[Tick, None, State]:
        """Exports the model, compares the file with torch, and measures accuracy and latency.

        The measurements are made in the runtime of the format, such as ONNX Runtime.
        """
        row = FORMATS[self.format]
        task = state.data.task
        yield Tick(0, 4, f"writing {row.suffix}")
        stem = "model" if self.name == "export" else self.name
        path = folder.run / "artifacts" / f"{stem}{row.suffix}"
        path.parent.mkdir(exist_ok=True)
        model = state.model.to("cpu")
        artifact = self._export(state, path)
        inputs.write_preparation(state, folder.run / "artifacts", folder.run)

        yield Tick(1, 4, "comparing with torch")
        test = state.data.test
        x = self._parity_inputs(state)
        # First compare the file with the graph that it was written from (for int8 the quantized
        # graph). Only float rounding may differ, so a larger error is a bug of the export.
        same = deploy.parity(artifact.program or model, path, x, tolerance=artifact.tolerance)
        # Then compare it with the model in torch: this shows what int8 costs.
        agree, apart = _compared(task, model, path, x)

        yield Tick(2, 4, f"measuring {task.shown_metrics[0].name}")
        metrics = dict[str, Any](dict.fromkeys(task.keys))
        if len(test):
            metrics |= deploy.metrics(path, test, state.data.preprocess, task)
        yield Tick(3, 4, "measuring latency")
        # One example: a device answers one request at a time.
        time = deploy.latency(path, x[:1])
        yield Tick(4, 4)
        parity = {
            "max_abs_error": same.max_abs_error,
            "relative_error": same.relative_error,
            # Without classes the largest output means nothing.
            "same_argmax_share": None if agree is None else same.same_argmax_share,
            "same_argmax_as_model": agree,
            "relative_error_of_model": apart,
            "examples": same.examples,
            "conditions": same.conditions,
        }
        facts: dict[str, Any] = {
            "artifact": f"artifacts/{path.name}",
            "format": self.format,
            "int8": self.int8,
            "file_bytes": artifact.file_bytes,
            **description(task),
            **metrics,
            "latency_ms": time.median_ms,
            "latency_p10_ms": time.p10_ms,
            "latency_p90_ms": time.p90_ms,
            "runtime": row.runtime,
            "conditions": time.conditions,
            "left_float": artifact.left_float,
            "parity": parity,
        }
        simulated = bool(state.spec.quantized)
        words = difference_in_words(
            apart, task, metrics[task.primary], state.score, simulated=simulated
        )
        if words:
            facts[DIFFERENCES] = {path.name: words}
        return replace(state, model=model, facts=facts)

    def _parity_inputs(self, state: State) -> Inputs:
        """Returns inputs for comparing the file with the model: test examples, or else noise."""
        test = state.data.test
        if len(test):
            return state.data.preprocess(test.x[: self.parity_examples])
        stream = public_stream(state.seed, "export", "noise")
        return state.spec.example(self.parity_examples, stream)

    def _export(self, state: State, path: Path, *, few: bool = False) -> Artifact:
        """Writes the exported file.

        Args:
            state: the state of the run.
            path: where to write the file.
            few: whether the ranges for int8 come from only two examples, as is enough for `check`.
        """
        if len(state.data.test):
            examples = state.data.preprocess(state.data.test.x[:2])
        elif len(state.data.public):
            examples = state.data.preprocess(state.data.public.x[:2])
        else:
            examples = state.example(2)
        # A float tensor is described by its shape alone. Token ids and several inputs need values,
        # because a made-up token may lie beyond the vocabulary.
        given: InputSpec = examples
        if isinstance(examples, Tensor) and examples.is_floating_point():
            given = tuple(examples.shape[1:])
        job = Job.of(
            given,
            preprocess=state.data.preprocess,
            metadata=_metadata(state),
            columns=RawColumns.of(state.spec.preparation) if self.preparation == "inside" else None,
            batches=self._batches(state, few=few) if self.int8 else (),
            observer=self.observer,
            weight_bits=self.weight_bits,
        )
        return deploy.export(state.model, path, self.format, job)

    def _batches(self, state: State, *, few: bool) -> tuple[Inputs, ...]:
        """Draws batches of public examples for the ranges of int8.

        Ranges computed from private examples would cost privacy.
        """
        public = state.data.public
        if not len(public):
            raise DataError(
                "ranges are measured on public examples, but the public part is empty",
                place="int8",
                cure=(
                    "give public examples by ",
                    Argument("data.public_share", 0.1),
                    ", or ",
                    Argument("int8", False),
                ),
            )
        order = public_stream(state.seed, "export", self.name).permutation(len(public))
        taken = public.take(order[: 2 if few else self.calibration])
        return state.data.preprocess(taken.x).split(BATCH)


def _compared(task: Task, model: nn.Module, path: Path, x: Inputs) -> tuple[float | None, float]:
    """Compares outputs of the exported file with outputs of the model on standardised inputs.

    Returns:
        The share of examples with the same prediction: None if predictions are numbers, 1 if
        outputs have one axis only. And the relative error |file - model| / |model| of the outputs;
        of several, that of all numbers together.
    """
    if task.several_outputs:
        in_file = torch.cat([t.double().flatten() for t in deploy.file_outputs(path, x)])
        in_torch = torch.cat([t.double().flatten() for t in deploy.model_outputs(model, x)])
        return None, float((in_file - in_torch).norm() / in_torch.norm().clamp_min(1e-30))
    in_torch, in_file = deploy.logits(model, x), deploy.file_logits(path, x)
    agree = task.agreement(in_torch, in_file) if in_torch.dim() > 1 else 1.0
    # The clamp avoids 0 / 0 if all outputs are zero.
    apart = float((in_file - in_torch).norm() / in_torch.norm().clamp_min(1e-30))
    return agree, apart


def _metadata(state: State) -> dict[str, str]:
    """Returns the metadata of the file: class names, task, and how a row becomes its input."""
    metadata = {"class_names": json.dumps(state.data.class_names)}
    about = state.data.task.to_json()
    if about:
        metadata["task"] = json.dumps(about)
    if state.spec.preparation:
        metadata["preparation"] = json.dumps(state.spec.preparation)
    return metadata


def difference_in_words(
    apart: float, task: Task, file: float | None, model: float | None, *, simulated: bool
) -> str:
    """Returns a sentence on how the file differs from the model; "" if the difference is small.

    Args:
        apart: relative error of the outputs, |file - model| / |model|.
        task: gives name and format of the metric.
        file: metric of the file; None without test examples.
        model: metric of the torch model; None without test examples.
        simulated: whether the torch model simulates quantization.
    """
    metric = task.shown_metrics[0]
    lost = 0.0
    if file is not None and model is not None:
        lost = abs(model - file)
    # A change of accuracy is a difference of shares. Other metrics may have a unit, such as euros,
    # so their changes are relative.
    if model and not metric.share:
        lost /= abs(model)
    if apart <= MAX_OUTPUT_ERROR and lost <= MAX_METRIC_CHANGE:
        return ""
    whose = "the network simulated in torch" if simulated else "the network in torch"
    words = f"its outputs are {100 * apart:.1f}% off those of {whose}"
    if file is not None and model is not None:
        words += f"; {metric.name} {metric.formatted(file)} against {metric.formatted(model)}"
    return words
