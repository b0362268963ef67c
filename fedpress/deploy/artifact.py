"""What is asked of an export, what it gives, and files that are written whole or not at all."""

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
from fedpress.deploy.examples import Given, check_tensors, example_of, is_shape
from fedpress.errors import Argument, ExportError
from fedpress.nn.observers import Observer

TOLERANCE = 1e-4  # of the largest logit, or absolute where all logits are below 1: float32 sums in another order
ROUNDING = 0.05  # the same for integers: a value between two steps may fall to either side, and be carried on


@dataclass(frozen=True)
class Job:
    """What is asked of an export.

    Attributes:
        input_shape: shape of one float32 example, such as (3, 32, 32), of a model that takes one such tensor.
        example: a batch of inputs of any other model, at least one row: a tensor (token ids are int64), a tuple of
            tensors in the order of forward's arguments, or a dictionary by their names. The batch size of the file is
            free, other sizes are those of the example.
        preprocess: what the training applied to raw examples: it is no part of the file, its numbers stand in it.
        metadata: further words for the file, such as class names.
        batches: public inputs to take ranges from, of the form of `example` or standardised [n, *input_shape]: with
            them the file computes on 8-bit integers, without them in float (weights that the model holds in fewer bits
            stay small).
        observer: how ranges are taken from what was seen (`fedpress.nn.observers`).
        weight_bits: of layers that are float in the model; 7 where 8 overflow (see docs/devices.md).
    """

    input_shape: tuple[int, ...] = ()
    preprocess: Preprocess = Preprocess()  # noqa: RUF009  (frozen)
    metadata: Mapping[str, str] = field(default_factory=dict)
    batches: tuple[Example, ...] = ()
    observer: Observer = "minmax"
    weight_bits: Literal[7, 8] = 8
    example: Example | None = None

    def __post_init__(self) -> None:
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
    def of(cls, given: Given, **more: Any) -> Job:
        """Makes the job of a model that takes `given`: the shape of one float32 example, or a batch of inputs."""
        if is_shape(given):
            return cls(input_shape=given, **more)
        return cls(example=example_of(given), **more)

    @property
    def given(self) -> Given:
        """What the model takes: `example`, or the shape of one."""
        return self.input_shape if self.example is None else self.example

    def one_shape(self, format: str) -> tuple[int, ...]:
        """Returns the shape of one float32 example.

        Raises:
            ExportError: if the model takes something else, which files of `format` do not.
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

    def words(self) -> dict[str, str]:
        """Says in the file's own words what a device must do with a raw example."""
        how = "float32 [N, *input_shape]: bytes / 255 (floats as they are), then (x - mean) / std per channel if given"
        own = {**self.metadata, "fedpress_version": fedpress.__version__}
        if self.example is not None and not isinstance(self.example, Tensor):
            listed = "the tensors that the file lists, each with the batch dimension first"
            return own | {"input": f"{listed}; bytes / 255, other numbers as they are"}
        shape, kind = self.input_shape, torch.float32
        if isinstance(self.example, Tensor):
            shape, kind = tuple(self.example.shape[1:]), self.example.dtype
        if not kind.is_floating_point:
            name = str(kind).removeprefix("torch.")
            return own | {
                "input": f"{name} [N, *input_shape]",
                "input_shape": json.dumps(list(shape)),
            }
        return {
            **own,
            "input": how,
            "input_shape": json.dumps(list(shape)),
            "mean": json.dumps(list(self.preprocess.mean)),
            "std": json.dumps(list(self.preprocess.std)),
        }


@dataclass(frozen=True)
class Artifact:
    """One exported file.

    Attributes:
        path: where it is.
        file_bytes: its size.
        metadata: the words inside it.
        left: module or operation that computes in float though integers were asked for -> the reason.
        program: the rounded graph that it was lowered from, to compare with; None if it is the float model itself.
        rounds: whether it rounds values that it computes: two runtimes may then fall to either side of a step.
    """

    path: Path
    file_bytes: int
    metadata: dict[str, str]
    left: dict[str, str] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None
    rounds: bool = False

    @property
    def tolerance(self) -> float:
        """How far an output may be from that of `program`, or of the model: see `deploy.parity`."""
        return ROUNDING if self.rounds else TOLERANCE


def write(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames, so that no half file is ever seen.

    Raises:
        ExportError: if the disk does not take it; the file that was there before stays.
    """
    cure = ("free space or choose another ", Argument("out"))
    with writing(path, raises=ExportError, full=cure, other=cure):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
