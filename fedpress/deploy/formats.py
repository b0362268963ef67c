"""The kinds of artifacts, a table: what writes each, what runs it, and what must be installed.

To add one: a module beside this one with `export(model, path, job) -> Artifact` and `open(path, threads) -> Session`,
and one row below. Parity, accuracy, latency, the export stage and
measure read the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from fedpress.deploy.artifact import Artifact, Job
from fedpress.deploy.executorch import export_executorch, open_executorch
from fedpress.deploy.litert import export_litert, open_litert
from fedpress.deploy.onnx import export_onnx, open_onnx
from fedpress.deploy.openvino import export_openvino, open_openvino
from fedpress.deploy.session import Session
from fedpress.errors import ExportError, suggestion


@dataclass(frozen=True)
class Format:
    """One kind of artifact.

    Attributes:
        suffix: of its files, which is how a file is recognised.
        runtime: the program that runs it here.
        packages: Python packages to import.
        install: what pip must be given to have them.
        export: writes a model.
        open: loads a file on so many threads (0: as the runtime likes).
        batch: the one batch size that its files take; None if any.
    """

    suffix: str
    runtime: str
    packages: tuple[str, ...]
    install: str
    export: Callable[[nn.Module, Path, Job], Artifact]
    open: Callable[[Path, int], Session]
    batch: int | None = None

    def missing(self) -> str | None:
        """Returns the command that installs what is missing; None if everything is there."""
        lacks = [name for name in self.packages if find_spec(name) is None]
        return f"pip install {self.install}" if lacks else None


FORMATS: dict[str, Format] = {
    "onnx": Format(
        ".onnx", "onnxruntime", ("onnx", "onnxscript", "onnxruntime"), "onnx onnxscript onnxruntime",
        export_onnx, open_onnx,
    ),
    "executorch": Format(
        ".pte", "ExecuTorch", ("executorch",), "'fedpress[executorch]'", export_executorch, open_executorch, batch=1,
    ),
    "litert": Format(
        ".tflite", "LiteRT", ("litert_torch", "ai_edge_litert"), "'fedpress[litert]'", export_litert, open_litert,
        batch=1,
    ),
    "openvino": Format(
        ".xml", "OpenVINO", ("openvino",), "'fedpress[openvino]'", export_openvino, open_openvino,
    ),
}  # fmt: skip


def unknown_format(format: str) -> ExportError:
    """Returns the error for a format that is not in `FORMATS`, with what to give instead."""
    known = f"use one of {', '.join(FORMATS)}"
    return ExportError(
        f"no format '{format}'", place="format", cure=suggestion(format, list(FORMATS), known)
    )


def export(model: nn.Module, path: str | Path, format: str, job: Job) -> Artifact:
    """Writes `model` as one of `FORMATS`.

    Raises:
        ExportError: if there is no such format, its packages are missing (with the command that installs them), or
            the model cannot be exported.
    """
    if format not in FORMATS:
        raise unknown_format(format)
    row = FORMATS[format]
    if command := row.missing():
        raise ExportError(
            f"'{format}' needs packages that are missing",
            place="format",
            cure=f"run `{command}`",
        )
    return row.export(model, Path(path), job)


def of_file(path: str | Path) -> Format:
    """Returns the row of a file by its suffix.

    Raises:
        ExportError: if no format has this suffix, or what runs it is not installed.
    """
    row = next((row for row in FORMATS.values() if Path(path).suffix == row.suffix), None)
    if row is None:
        known = ", ".join(row.suffix for row in FORMATS.values())
        raise ExportError(
            f"{path} is no file that can be run here",
            place="path",
            cure=f"give one that ends in {known}",
        )
    if command := row.missing():
        raise ExportError(
            f"{row.runtime} is not installed to run {path}", place="path", cure=f"run `{command}`"
        )
    return row


def file_bytes(path: str | Path) -> int:
    """Returns how large an artifact is, with the weights that OpenVINO keeps beside its graph.

    Raises:
        ExportError: if there is no such file.
    """
    files = [Path(path)] + ([Path(path).with_suffix(".bin")] if Path(path).suffix == ".xml" else [])
    for file in files:
        if not file.exists():
            raise ExportError(f"there is no file {file}", place="path", cure="export it again")
    return sum(file.stat().st_size for file in files)


def open_file(path: str | Path, *, threads: int = 0) -> Session:
    """Loads an artifact; what is returned is called like the model, with arrays in the place of tensors.

    Args:
        path: the file.
        threads: how many it computes on; 0: as the runtime likes.

    Raises:
        ExportError: if it cannot be loaded.
    """
    row = of_file(path)
    file_bytes(path)  # whether all of it is there
    return row.open(Path(path), threads)
