"""The settings of an export (`Job`), its result (`Artifact`), and the atomic write of its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import fedpress
from fedpress.core.examples import Preprocess
from fedpress.core.files import replacing, writing
from fedpress.core.inputs import Example
from fedpress.deploy.examples import InputSpec, check_tensors, example_of, is_shape
from fedpress.deploy.raw_columns import RawColumns
from fedpress.errors import Argument, ExportError
from fedpress.nn.observers import Observer

# Allowed absolute error of an output. If the largest absolute value of the output is above 1, the
# allowed error is multiplied by it. This value is for files that compute in float: runtimes add
# numbers in another order than torch.
TOLERANCE = 1e-4
# The same for files that compute on integers: a value halfway between two steps may be rounded up
# in one runtime and down in another, and the later layers compute with that difference.
ROUNDING = 0.05


@dataclass(frozen=True)
class Job:
    """The settings of an export. Give either `input_shape` or `example`.

    Attributes:
        input_shape: shape of one float32 example, such as (3, 32, 32), for a model with one input.
        example: a batch of inputs for any other model, with at least one row. It is a tensor (token
            ids are int64), a tuple of tensors in the order of forward's arguments, or a dictionary
            by argument name. The file takes any batch size; all other sizes are fixed by the
            example.
        preprocess: the standardisation that training applied to raw examples. The file does not
            compute it; mean and standard deviation are in its metadata.
        metadata: more entries for the file's metadata, such as class names.
        batches: batches of public examples for calibration, in the form of `example` or as
            standardised float32 [n, *input_shape]. If there are any, the file computes on 8-bit
            integers, else in float. In both cases quantized weights are stored in few
            bits if the format supports this.
        observer: name of the rule that computes value ranges from the calibration batches (see
            `fedpress.nn.observers`).
        weight_bits: bits to which float weights of the model are quantized; 7 for processors on
            which sums of 8-bit products overflow (see docs/devices.md).
        columns: ONNX: the preparation of a table, which becomes part of the graph; the file then takes
            raw columns. None: the file takes standardised inputs.
    """

    input_shape: tuple[int, ...] = ()
    preprocess: Preprocess = Preprocess()  # noqa: RUF009  (frozen)
    metadata: Mapping[str, str] = field(default_factory=dict)
    batches: tuple[Example, ...] = ()
    observer: Observer = "minmax"
    weight_bits: Literal[7, 8] = 8
    example: Example | None = None
    columns: RawColumns | None = None

    def __post_init__(self) -> None:
        # A tensor is a sequence too: its rows would pass as batches.
        if isinstance(self.batches, Tensor | Mapping):
            raise ExportError(
                "got one batch, expected a tuple of them",
                place="batches",
                cure="give several, such as x.split(64)",
            )
        if self.example is None and not self.input_shape:
            raise ExportError(
                "neither input_shape nor example says what the model takes",
                place="input_shape",
                cure="give the shape of one float32 example, or a batch of inputs as example",
            )
        if self.example is not None:
            check_tensors(self.example, "example")

    @classmethod
    def of(cls, given: InputSpec, **more: Any) -> Job:
        """Makes a job from the shape of one float32 example, or from a batch of inputs."""
        if is_shape(given):
            return cls(input_shape=given, **more)
        return cls(example=example_of(given), **more)

    @property
    def input_spec(self) -> InputSpec:
        """The inputs of the model: `example` if there is one, else `input_shape`."""
        return self.input_shape if self.example is None else self.example

    def one_shape(self, format: str) -> tuple[int, ...]:
        """Returns the shape of one float32 example.

        Raises:
            ExportError: if the model takes anything but one float32 tensor, which files of `format`
                do not support.
        """
        if self.example is None:
            return self.input_shape
        if isinstance(self.example, Tensor) and self.example.is_floating_point():
            return tuple(self.example.shape[1:])
        raise ExportError(
            f"files of {format} take one float32 tensor",
            place="format",
            cure="export as onnx or openvino",
        )

    def file_metadata(self) -> dict[str, str]:
        """Returns the metadata of the file, which tells a device how to prepare a raw example."""
        # The version goes last, so that a caller's entry cannot replace it.
        entries = {**self.metadata, "fedpress_version": fedpress.__version__}
        if self.example is not None and not isinstance(self.example, Tensor):
            listed = "the tensors that the file lists, each with the batch dimension first"
            return entries | {"input": f"{listed}; bytes / 255, other numbers as they are"}

        shape, dtype = self.input_shape, torch.float32
        if isinstance(self.example, Tensor):
            shape, dtype = tuple(self.example.shape[1:]), self.example.dtype
        if not dtype.is_floating_point:
            name = str(dtype).removeprefix("torch.")
            return entries | {
                "input": f"{name} [N, *input_shape]",
                "input_shape": json.dumps(list(shape)),
            }
        found = {
            **entries,
            "input": (
                "float32 [N, *input_shape]: bytes / 255 (floats as they are), "
                "then (x - mean) / std per channel if given"
            ),
            "input_shape": json.dumps(list(shape)),
            "mean": json.dumps(list(self.preprocess.mean)),
            "std": json.dumps(list(self.preprocess.std)),
        }
        return found if self.columns is None else found | self.columns.metadata()


@dataclass(frozen=True)
class Artifact:
    """One exported file.

    Attributes:
        path: the file.
        file_bytes: size of the file.
        metadata: the entries that are stored in the file.
        left_float: module or operation that computes in float although integers were asked for, or
            whose weights are stored in more bits than they need -> the reason.
        program: the quantized graph from which the file was made, for comparing outputs; None if
            the file was made from the float model.
        rounds: whether the file rounds activations. Two runtimes may then round the same value to
            different steps, so `tolerance` is larger.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, str]
    left_float: dict[str, str] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None
    rounds: bool = False

    @property
    def tolerance(self) -> float:
        """Allowed error of an output of the file, compared with `program` or the float model."""
        return ROUNDING if self.rounds else TOLERANCE


def write(path: Path, data: bytes) -> None:
    """Writes `data` to a temporary file beside `path`, then renames it to `path`.

    Raises:
        ExportError: if the file cannot be written. An older file at `path` is then not changed.
    """
    cure = ("free space or choose another ", Argument("out"))
    with writing(path, raises=ExportError, full=cure, other=cure):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
