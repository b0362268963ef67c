"""A model becomes one graph of operations, or an error that names the module in the way."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fedpress.core.inputs import Example, arguments, tensors_of
from fedpress.deploy.examples import Given, as_device, batch_dims, example_of, ordered, take
from fedpress.errors import ExportError
from fedpress.nn.resize import copied

BATCH = "batch"

FIXED = "specialized it to be a constant"
_CURES = (  # what torch.export says, what it means, what helps
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


def require(*packages: str, install: str = "") -> dict[str, Any]:
    """Imports `packages` by name, so that fedpress itself starts without them.

    Args:
        packages: names to import, such as "onnxruntime".
        install: what to give to pip; empty if the packages are called as they are imported.

    Raises:
        ExportError: if one is missing or cannot be loaded, with the command that installs it.

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
    model: nn.Module, given: Given, *, batch: int | None = None
) -> torch.export.ExportedProgram:
    """Traces a float32 CPU copy of `model` in evaluation mode; the model itself is left as it was.

    Args:
        model: maps a batch to tensors, alone or in tuples and dictionaries.
        given: shape of one float32 example, or a batch of inputs.
        batch: the batch size of the graph; None leaves it free.

    Raises:
        ExportError: if the model cannot be captured, naming the module, or if a parameter is not finite, naming it.
    """
    check_finite(model)
    model = copied(model).to("cpu", torch.float32).eval()
    example = ordered(model, example_of(given))
    example = take(
        as_device(example), batch or 2
    )  # torch.export takes a size of one for a constant
    try:
        return trace(model, example, free=batch is None)
    except (
        Exception
    ) as error:  # torch.export raises what the model raises, and more than a dozen types of its own
        said = str(error)
        if (
            FIXED in said
        ):  # `len(x)` is a number to Python; only who reads the code sees that it is the batch size
            with contextlib.suppress(Exception):
                return trace(model, example, free=batch is None, strict=True)
        first = said.strip().splitlines()[0].rstrip(".") if said.strip() else type(error).__name__
        known = [(why, cure) for pattern, why, cure in _CURES if re.search(pattern, said)]
        unknown = (first, f"check that it takes {_described(example)}")
        why, cure = known[0] if known else unknown
        raise ExportError(
            f"{_blame(model, error)} cannot be captured: {why}", place="model", cure=cure
        ) from error


def trace(
    model: nn.Module, example: Example, *, free: bool, strict: bool = False
) -> torch.export.ExportedProgram:
    """Captures `model` on a batch of two rows or more, whose size stays `free` or is that of the file.

    `strict` reads the code of forward in place of running it: it follows `len(x)`, but knows less of Python.
    """
    args, named = arguments(example)
    shapes = batch_dims(model, example, {0: torch.export.Dim(BATCH)}) if free else None
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operation, which no file has
        with torch.no_grad():
            return torch.export.export(model, args, named, dynamic_shapes=shapes, strict=strict)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _described(example: Example) -> str:
    """Says what a model is called with, such as `a float32 batch [N, 3, 8, 8]`."""
    names = (
        [f"'{name}' as " for name in example]
        if isinstance(example, Mapping)
        else [""] * len(tensors_of(example))
    )
    words = []
    for name, t in zip(names, tensors_of(example), strict=True):
        sizes = ", ".join(["N", *map(str, t.shape[1:])])
        words.append(f"{name}a {str(t.dtype).removeprefix('torch.')} batch [{sizes}]")
    return " and ".join(words)


def check_finite(model: nn.Module) -> None:
    """Raises ExportError, with the name, if a parameter is NaN or infinite, or a statistic of a batch norm is NaN."""
    statistics = [
        (n, b)
        for n, b in model.named_buffers()
        if n.rpartition(".")[2] in ("running_mean", "running_var")
    ]
    for name, tensor in [*model.named_parameters(), *statistics]:
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"{name!r} has NaN or infinite values",
                place="model",
                cure="load a checkpoint from before training broke",
            )


def _blame(model: nn.Module, error: BaseException) -> str:
    """Names the innermost module of `model` that was running when `error` was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    inner: nn.Module = model
    trace = error.__traceback__
    while trace:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            inner = owner
        trace = trace.tb_next
    name = names[id(inner)]
    return (
        f"module {name!r} ({type(inner).__name__})"
        if name
        else f"the model ({type(inner).__name__})"
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps an exporter's progress, graph dumps and warnings off the terminal; the errors say what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)
