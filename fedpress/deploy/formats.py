"""The table of file formats, such as ONNX: which functions write and open files of each format.

To add a format, write a module with `export(model, path, job) -> Artifact`,
`open(path, threads) -> Session` and `read_metadata(path)`, and add a row below. Everything else,
such as the export stage and `measure`, uses the row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch import nn

from fedpress.deploy import executorch, litert, onnx, openvino
from fedpress.deploy.artifact import Artifact, Job
from fedpress.deploy.capture import extra
from fedpress.deploy.executorch import export_executorch, open_executorch
from fedpress.deploy.litert import export_litert, open_litert
from fedpress.deploy.onnx import export_onnx, open_onnx
from fedpress.deploy.openvino import export_openvino, open_openvino
from fedpress.deploy.session import Session
from fedpress.errors import ExportError, suggestion


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        suffix: suffix of the files, by which a file is recognised.
        runtime: name of the runtime that runs the files on this machine.
        packages: Python packages that the format needs.
        install: arguments of `pip install` for these packages.
        export: function that writes a model.
        open: function that loads a file; arguments: path and threads (0: the runtime chooses).
        metadata: function that reads the metadata in a file.
        batch: the only batch size that the files take; None: they take any batch size.
    """

    suffix: str
    runtime: str
    packages: tuple[str, ...]
    install: str
    export: Callable[[nn.Module, Path, Job], Artifact]
    open: Callable[[Path, int], Session]
    metadata: Callable[[Path], dict[str, str]]
    batch: int | None = None

    def missing(self) -> str | None:
        """Returns the command that installs missing packages; None if all are installed."""
        # The packages are not imported, because imports take seconds.
        if all(find_spec(name) is not None for name in self.packages):
            return None
        return f"pip install {self.install}"


# ExecuTorch and LiteRT programs have a fixed batch size. It is 1 here, because a device answers one
# request at a time.
FORMATS: dict[str, Format] = {
    "onnx": Format(
        suffix=".onnx",
        runtime="onnxruntime",
        packages=("onnx", "onnxscript", "onnxruntime"),
        install="onnx onnxscript onnxruntime",
        export=export_onnx,
        open=open_onnx,
        metadata=onnx.read_metadata,
    ),
    "executorch": Format(
        suffix=".pte",
        runtime="ExecuTorch",
        packages=("executorch",),
        install=extra("executorch"),
        export=export_executorch,
        open=open_executorch,
        metadata=executorch.read_metadata,
        batch=1,
    ),
    "litert": Format(
        suffix=".tflite",
        runtime="LiteRT",
        packages=("litert_torch", "ai_edge_litert"),
        install=extra("litert", "constraints-litert.txt"),
        export=export_litert,
        open=open_litert,
        metadata=litert.read_metadata,
        batch=1,
    ),
    "openvino": Format(
        suffix=".xml",
        runtime="OpenVINO",
        packages=("openvino",),
        install=extra("openvino"),
        export=export_openvino,
        open=open_openvino,
        metadata=openvino.read_metadata,
    ),
}
"""Name of each format, as users write it -> its description."""


def unknown_format(format: str) -> ExportError:
    """Returns the error for a format that is not in `FORMATS`, with what to give instead."""
    known = f"use one of {', '.join(FORMATS)}"
    return ExportError(
        f"no format '{format}'", place="format", cure=suggestion(format, list(FORMATS), known)
    )


def export(model: nn.Module, path: str | Path, format: str, job: Job) -> Artifact:
    """Writes `model` to a file in one of the `FORMATS`.

    Raises:
        ExportError: if there is no such format, its packages are missing (with the command that
            installs them), or the model cannot be exported.
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


def format_of(path: str | Path) -> Format:
    """Returns the format of a file, by the suffix of its name.

    Raises:
        ExportError: if no format has this suffix, or its packages are not installed.
    """
    by_suffix = {row.suffix: row for row in FORMATS.values()}
    row = by_suffix.get(Path(path).suffix)
    if row is None:
        raise ExportError(
            f"{path} is no file that can be run here",
            place="path",
            cure=f"give one that ends in {', '.join(by_suffix)}",
        )
    if command := row.missing():
        raise ExportError(
            f"{row.runtime} is not installed to run {path}", place="path", cure=f"run `{command}`"
        )
    return row


def file_metadata(path: str | Path) -> dict[str, str]:
    """Returns the metadata in an exported file: class names, task, preparation, mean and std.

    Raises:
        ExportError: if the file cannot be loaded.
    """
    row = format_of(path)
    file_bytes(path)
    return row.metadata(Path(path))


def file_bytes(path: str | Path) -> int:
    """Returns the size of an exported file in bytes.

    For OpenVINO it includes the weights, which are in a second file.

    Raises:
        ExportError: if a file is missing.
    """
    files = [Path(path)]
    # Only OpenVINO writes two files: the graph, and the weights beside it.
    if Path(path).suffix == ".xml":
        files.append(Path(path).with_suffix(".bin"))
    for file in files:
        if not file.exists():
            raise ExportError(f"there is no file {file}", place="path", cure="export it again")
    return sum(file.stat().st_size for file in files)


def open_file(path: str | Path, *, threads: int = 0) -> Session:
    """Loads an exported file. The session is called like the model, with numpy arrays for tensors.

    Args:
        path: the file.
        threads: number of threads; 0: the runtime chooses.

    Raises:
        ExportError: if the file cannot be loaded.
    """
    row = format_of(path)
    # Called only for its error, which names a missing file, also OpenVINO's second file.
    file_bytes(path)
    return row.open(Path(path), threads)
