"""The calls: `prune(MODEL, keep_params=0.3)` and its like; each runs one stage to its end and returns the result."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedpress import consent
from fedpress import run as runs
from fedpress.commands.order import Order, Result, as_words
from fedpress.commands.subject import Subject, holding
from fedpress.data import FederatedData
from fedpress.errors import ModelError
from fedpress.folder import RunFolder

Model = str | Path | nn.Module


def call(
    kind: str,
    model: Model,
    *,
    data: str | FederatedData | None = None,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    out: str | Path | None = None,
    allow_code: Collection[str] | str = (),
    **settings: Any,
) -> Result:
    """Runs one stage on one model.

    Args:
        kind: of the stage.
        model: the folder of a model or of a run, a packed file, `module:function`, or a module, which is not changed.
        data: a source such as "cifar10", or a loaded data set; by default that of the run that left the model.
        path: where the source finds its files.
        checkpoint: a state dict for `module:function`.
        input_shape: of one example, for a module or function without data.
        out: the run folder to write; without one the result lives in memory alone.
        allow_code: names `module:function` that the files of `model`, of its run or of a teacher may have called; a
            `model` that is given as `module:function` is allowed by that.
        settings: the keys of the stage.

    Raises:
        FedpressError: if something does not fit, saying what; before any work where it can be known.
    """
    if not isinstance(model, nn.Module | str | Path):
        raise ModelError(f"model: got {type(model).__name__}, expected a torch.nn.Module, a path or module:function")
    with ExitStack() as stack:
        stack.enter_context(consent.allowing(allow_code))
        stack.enter_context(torch.random.fork_rng(devices=[]))  # the caller's random numbers stay theirs
        if isinstance(model, nn.Module):
            subject = Subject(stack.enter_context(holding(model)))
        else:
            subject = Subject.find(model, weights=Path(checkpoint) if checkpoint is not None else None)
        shape = data.example_shape if isinstance(data, FederatedData) else input_shape
        order = Order.bind(
            kind,
            subject,
            as_words(settings),
            source=data if isinstance(data, str) else None,
            path=Path(path) if path is not None else None,
            input_shape=shape,
        )
        loaded = data if isinstance(data, FederatedData) else order.load_data()
        order.check(loaded)
        place = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = RunFolder.create(place, order.text, runs.settings(order.recipe))
        runs.note_environment(folder, shlex.join([f"fedpress.commands.{kind}", str(model)[:200]]))
        for _ in order.execute(folder, loaded):
            pass
        result = Result.read(folder, kind)
        if out is not None and not isinstance(model, nn.Module):
            return result
        kept = {} if out is not None else {"folder": None, "artifact": None}
        spec = None if isinstance(model, nn.Module) else result.spec
        return Result(**{**result.__dict__, **kept, "spec": spec})


def prune(model: Model, **settings: Any) -> Result:
    """Removes whole channels; see `call` and `fedpress.stages.PruneStage`."""
    return call("prune", model, **settings)


def sparsify(model: Model, **settings: Any) -> Result:
    """Sets weights to zero; see `call` and `fedpress.stages.SparsifyStage`."""
    return call("sparsify", model, **settings)


def l0(model: Model, **settings: Any) -> Result:
    """Learns which weights or channels are needed; see `call` and `fedpress.stages.L0Stage`."""
    return call("l0", model, **settings)


def quantize(model: Model, **settings: Any) -> Result:
    """Gives weights and inputs fewer bits; see `call` and `fedpress.stages.QuantizeStage`."""
    return call("quantize", model, **settings)


def train(model: Model, **settings: Any) -> Result:
    """Trains on the public part; see `call` and `fedpress.stages.TrainStage`."""
    return call("train", model, **settings)


def distill(model: Model, **settings: Any) -> Result:
    """Trains with a `teacher`, the path of a saved model; see `call` and `fedpress.stages.TrainStage`."""
    return call("distill", model, **settings)


def pack(model: Model, **settings: Any) -> Result:
    """Writes one small file that gives the same bits back; see `call` and `fedpress.stages.PackStage`."""
    return call("pack", model, **settings)


def export(model: Model, **settings: Any) -> Result:
    """Writes the file that a device runs, and runs it back; see `call` and `fedpress.stages.ExportStage`."""
    return call("export", model, **settings)
