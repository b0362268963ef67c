"""Wraps a model with several inputs as a model with one input: a row of numbers for each example.

Example: an image (3, 8, 8) and a vector (5,) become one row of 192 + 5 = 197 numbers, which
`Joined.forward` splits again. So stages that expect one input work on models with several inputs,
but without data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import deploy
from fedpress.deploy import FORMATS, Job
from fedpress.errors import Argument, ModelError
from fedpress.stages.table import commands

Shapes = tuple[tuple[int, ...], ...]
"""Shape of each input of a model, without the batch dimension."""


def several_shapes(input_shape: Any) -> Shapes | None:
    """Returns the shapes of several inputs; None if `input_shape` is the shape of a single input.

    Raises:
        ModelError: if `input_shape` mixes shapes and numbers, or a size is not above 0.

    >>> several_shapes([(3, 8, 8), (5,)])
    ((3, 8, 8), (5,))
    >>> several_shapes((3, 8, 8)) is None
    True
    """
    if not isinstance(input_shape, tuple | list) or not any(
        isinstance(part, tuple | list) for part in input_shape
    ):
        return None
    shapes = tuple(tuple(part) if isinstance(part, tuple | list) else () for part in input_shape)
    if not all(shape and all(isinstance(n, int) and n > 0 for n in shape) for shape in shapes):
        raise ModelError(
            f"got {input_shape!r}, expected the shape of each input",
            place="input_shape",
            cure=("give for instance ", Argument("input_shape", [(3, 8, 8), (5,)])),
        )
    return shapes


def one_shape(input_shape: Any) -> tuple[int, ...] | None:
    """Checks `input_shape=` for a model with one input; None (not given) stays None.

    Raises:
        ModelError: if `input_shape` is not a sequence of whole numbers above 0.

    >>> one_shape([3, 8, 8])
    (3, 8, 8)
    """
    if input_shape is None:
        return None
    sizes = tuple(input_shape) if isinstance(input_shape, tuple | list) else ()
    if not sizes or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes
    ):
        raise ModelError(
            f"got {input_shape!r}, expected the shape of one example",
            place="input_shape",
            cure=("give for instance ", Argument("input_shape", (3, 32, 32))),
        )
    return sizes


def known_shape(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns `shape`, the shape of one example of the model `name`.

    Raises:
        ModelError: if `shape` is None.
    """
    if shape is None:
        raise ModelError(
            f"the shape of an example of '{name}' is not known",
            place="input_shape",
            cure=("give it, such as ", Argument("input_shape", (3, 32, 32))),
        )
    return shape


class Joined(nn.Module):
    """Wraps a model with several inputs as a model with one input [n, d], one row per example."""

    def __init__(self, model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.model = model
        self.shapes = tuple(shapes)

    def forward(self, x: Tensor) -> Any:
        """Splits the rows into the inputs and runs the model."""
        sizes = [prod(shape) for shape in self.shapes]
        parts = x.split(sizes, 1)
        inputs = [
            part.reshape(x.shape[0], *shape) for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return self.model(*inputs)


def check(kind: str, model: object, data: object, out: object) -> None:
    """Checks that a command works on a model with several inputs.

    Args:
        kind: kind of stage, such as "prune".
        model: the argument `model=`; it must be a module.
        data: the argument `data=`; it must be None.
        out: the argument `out=`; it must be None.

    Raises:
        ModelError: if the stage or an argument does not work on such a model.
    """
    kinds = [row.kind for row in commands().values() if row.load().several_inputs]
    # Only some stages work on a row of joined inputs.
    if kind not in kinds:
        raise ModelError(
            "it takes models of one input",
            place=kind,
            cure=f"stages for models of several inputs: {', '.join(kinds)}",
        )
    if not isinstance(model, nn.Module):
        raise ModelError(
            "a list of input shapes works only with a torch.nn.Module",
            place="input_shape",
            cure="build the model and give the module",
        )
    if data is not None:
        raise ModelError(
            "models of several inputs are pruned and quantized without data",
            place="data",
            cure="leave it out",
        )
    if out is not None:
        raise ModelError(
            "a model of several inputs stays in memory",
            place="out",
            cure="leave it out and take result.model",
        )


def export(
    model: nn.Module, shapes: Shapes, *, format: str = "onnx"
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Exports a model with several inputs, and compares the outputs of the file with torch's.

    Args:
        model: the model.
        shapes: shape of each input, without the batch dimension.
        format: name of a file format, such as "onnx".

    Returns:
        A dictionary of file name -> bytes, and a dictionary of results: `format`, `file_bytes`, and
        `parity` with the largest absolute difference to torch's outputs.

    Raises:
        ExportError: if the model cannot be exported.
    """
    # A fixed seed: each call compares the outputs for the same eight random examples.
    chance = torch.Generator().manual_seed(0)
    example = tuple(torch.randn(8, *shape, generator=chance) for shape in shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{FORMATS[format].suffix if format in FORMATS else ''}"
        artifact = deploy.export(model, path, format, Job(input_shape=shapes[0], example=example))
        same = deploy.parity(model, path, example)
        # A format may write several files, such as a graph and its weights.
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    about = {
        "format": format,
        "file_bytes": artifact.file_bytes,
        "parity": {"max_abs_error": same.max_abs_error},
    }
    return files, about
