"""What is asked of an export, what it gives, and files that are written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import fedpress
from fedpress.arrays import Preprocess
from fedpress.atomic import replacing
from fedpress.errors import ExportError
from fedpress.ranges import Observer


@dataclass(frozen=True)
class Job:
    """What is asked of an export.

    Attributes:
        input_shape: shape of one example, such as (3, 32, 32).
        preprocess: what the training applied to raw examples: it is no part of the file, its numbers stand in it.
        metadata: further words for the file, such as class names.
        batches: standardised public examples [n, *input_shape] to take ranges from: with them the file computes on
            8-bit integers, without them in float (weights that the model holds in fewer bits stay small).
        observer: how ranges are taken from what was seen (`fedpress.ranges`).
        weight_bits: of layers that are float in the model; 7 where 8 overflow (see docs/devices.md).
    """

    input_shape: tuple[int, ...]
    preprocess: Preprocess = Preprocess()  # noqa: RUF009  (frozen)
    metadata: Mapping[str, str] = field(default_factory=dict)
    batches: tuple[Tensor, ...] = ()
    observer: Observer = "minmax"
    weight_bits: Literal[7, 8] = 8

    def __post_init__(self) -> None:
        if isinstance(self.batches, Tensor):
            raise ExportError("export: batches is one tensor; give a tuple of batches, such as x.split(64)")

    def words(self) -> dict[str, str]:
        """Says in the file's own words what a device must do with a raw example."""
        how = "float32 [N, *input_shape]: bytes / 255 (floats as they are), then (x - mean) / std per channel if given"
        return {
            **self.metadata,
            "fedpress_version": fedpress.__version__,
            "input": how,
            "input_shape": json.dumps(list(self.input_shape)),
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
    """

    path: Path
    file_bytes: int
    metadata: dict[str, str]
    left: dict[str, str] = field(default_factory=dict)
    program: torch.export.ExportedProgram | None = None


def write(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames, so that no half file is ever seen.

    Raises:
        ExportError: if the disk does not take it; the file that was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_bytes(data)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(
            f"export: cannot write {len(data)} bytes to {path}: {reason}; free space or choose another --out"
        ) from error
