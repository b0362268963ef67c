"""Captures a model as one `torch.export` graph; an error names the module that prevents it."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import shlex
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Example, arguments, tensors_of
from fedpress.deploy.examples import (
    InputSpec,
    as_device,
    batch_dims,
    example_of,
    ordered,
    take_rows,
)
from fedpress.errors import ExportError
from fedpress.nn.resize import copied

# Name of the batch dimension in graphs and files.
BATCH = "batch"

# The folder of the repository. In an installed package this folder has no constraints file.
CLONE = Path(__file__).parents[2]

# What torch.export says when the batch size is a constant in the graph.
FIXED = "specialized it to be a constant"

# Pattern in the message of torch.export, its meaning, the cure.
_CURES = (
    (
        r"in output, which is not a known type",
        "it returns a class of its own",
        "return a tuple or a dictionary, or call torch.export.register_dataclass on it",
    ),
    (
        r"data-dependent",
        "its control flow depends on the values of its input",
        "use torch.where in place of `if`",
    ),
    (
        FIXED,
        "it fixes the batch size",
        "use x.shape[0] or -1 in place of a number or of len(x)",
    ),
)


def extra(name: str, constraints: str = "constraints.txt") -> str:
    """Returns the arguments of `pip install` for an optional extra of fedpress, such as "openvino".

    In a clone of the repository these are the path of the clone and a file of pinned versions. So
    fedpress need not be on a package index.

    Args:
        name: name of the extra.
        constraints: the file of the clone that pins the versions.
    """
    pinned = CLONE / constraints
    if not pinned.is_file():
        return f"'fedpress[{name}]'"
    return f"-c {shlex.quote(str(pinned))} -e {shlex.quote(f'{CLONE}[{name}]')}"


def require(*packages: str, install: str = "") -> dict[str, Any]:
    """Imports optional `packages` at the time of the call, and returns the modules by name.

    Args:
        packages: names to import, such as "onnxruntime".
        install: arguments of `pip install`; empty if pip knows the packages by the same names.

    Raises:
        ExportError: if a package is missing or cannot be loaded. The error has the command that
            installs the package.

    >>> require("json")["json"].loads("1")
    1
    """
    try:
        return {name: importlib.import_module(name) for name in packages}
    except ImportError as error:
        name = error.name or packages[0]
        command = install or " ".join(packages)
        if not isinstance(error, ModuleNotFoundError):
            raise ExportError(
                f"it is there but cannot be loaded ({error})",
                place=f"package {name!r}",
                cure=f"run `pip install --force-reinstall {command}`",
            ) from error
        raise ExportError(
            "it is missing",
            place=f"package {name!r}",
            cure=f"run `pip install {command}`",
        ) from error


def capture(
    model: nn.Module, given: InputSpec, *, batch: int | None = None
) -> torch.export.ExportedProgram:
    """Traces a float32 CPU copy of `model` in evaluation mode; the model itself is not changed.

    Args:
        model: the model, which maps a batch to one tensor, or to tensors in tuples and
            dictionaries.
        given: shape of one float32 example, or a batch of inputs.
        batch: the batch size of the graph; None: the graph takes any batch size.

    Raises:
        ExportError: if the model cannot be captured, or a parameter is not finite. The error names
            the module or the parameter.
    """
    check_finite(model)
    model = copied(model).to("cpu", torch.float32).eval()
    example = ordered(model, example_of(given))
    # Two rows for a free batch size: torch.export treats a batch size of one as a constant.
    example = take_rows(as_device(example), batch or 2)
    try:
        return trace(model, example, free=batch is None)
    # torch.export raises what the model raises, and more than a dozen types of its own.
    except Exception as error:
        message = str(error)
        # While forward runs, `len(x)` is a plain int, so it becomes a constant in the graph. Strict
        # mode analyses the code of forward instead, and knows that the number is the batch size.
        if FIXED in message:
            with contextlib.suppress(Exception):
                return trace(model, example, free=batch is None, strict=True)
        why, cure = _explained(message, error, example)
        raise ExportError(
            f"{_blame(model, error)} cannot be captured: {why}", place="model", cure=cure
        ) from error


def _explained(message: str, error: Exception, example: Example) -> tuple[str, str]:
    """Returns what a message of torch.export means, and what to do about it."""
    for pattern, why, cure in _CURES:
        if re.search(pattern, message):
            return why, cure
    lines = message.strip().splitlines()
    why = lines[0].rstrip(".") if lines else type(error).__name__
    return why, f"check that it takes {_described(example)}"


def trace(
    model: nn.Module, example: Example, *, free: bool, strict: bool = False
) -> torch.export.ExportedProgram:
    """Captures `model` on the batch `example`.

    Args:
        model: the model, in evaluation mode.
        example: a batch of two rows or more.
        free: whether the graph takes any batch size; if not, only the batch size of `example`.
        strict: whether torch analyses the code of forward instead of running it. Strict
            mode supports `len(x)`, but fewer features of Python.
    """
    args, named = arguments(example)
    shapes = batch_dims(model, example, {0: torch.export.Dim(BATCH)}) if free else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fast path of attention is one fused operation that no file format has.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            return torch.export.export(model, args, named, dynamic_shapes=shapes, strict=strict)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _described(example: Example) -> str:
    """Describes the inputs of a model, such as `a float32 batch [N, 3, 8, 8]`."""
    tensors = tensors_of(example)
    names = [""] * len(tensors)
    if isinstance(example, Mapping):
        names = [f"'{name}' as " for name in example]
    parts = []
    for name, t in zip(names, tensors, strict=True):
        sizes = ", ".join(["N", *map(str, t.shape[1:])])
        parts.append(f"{name}a {str(t.dtype).removeprefix('torch.')} batch [{sizes}]")
    return " and ".join(parts)


def check_finite(model: nn.Module) -> None:
    """Checks that parameters and batch-norm statistics are finite.

    Raises:
        ExportError: if one has NaN or infinite values; the error names the first such tensor.
    """
    checked: dict[str, Tensor] = dict(model.named_parameters())
    # Other buffers may be infinite on purpose, such as an attention mask of -inf.
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            checked[name] = buffer
    for name, tensor in checked.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"{name!r} has NaN or infinite values",
                place="model",
                cure="load a checkpoint from before training broke",
            )


def _blame(model: nn.Module, error: BaseException) -> str:
    """Returns the name of the innermost module that was running when `error` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    inner: nn.Module = model
    # The traceback is ordered from the outermost call to the innermost, so the last match counts.
    frame = error.__traceback__
    while frame:
        owner = frame.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            inner = owner
        frame = frame.tb_next
    name = names[id(inner)]
    kind = type(inner).__name__
    return f"module {name!r} ({kind})" if name else f"the model ({kind})"


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards the progress, graph dumps and warnings of exporters; errors still propagate."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
