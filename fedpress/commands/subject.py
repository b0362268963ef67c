"""MODEL, what a command is given: a folder, a run, a packed file, `module:function`, or a module in memory."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpress import consent, storage
from fedpress.arrays import Arrays, Preprocess
from fedpress.data import FederatedData
from fedpress.errors import DataError, ModelError, did_you_mean
from fedpress.folder import read_json
from fedpress.layers import copied
from fedpress.models import ARCHITECTURES, ModelSpec

NOTHING = "fedpress.commands.subject:no_data"
HELD = "fedpress.commands.subject:held"
_held: dict[str, nn.Module] = {}


@dataclass(frozen=True)
class Subject:
    """What a command works on.

    Attributes:
        model: the `[model]` table of its recipe.
        spec: of a saved model, else None.
        run: the run that left it, None if it lies in none.
    """

    model: dict[str, Any]
    spec: ModelSpec | None = None
    run: Path | None = None

    @classmethod
    def find(cls, model: str | Path, *, weights: Path | None = None) -> Subject:
        """Looks at the path first, then for an architecture.

        Raises:
            ModelError: if it is neither, or what lies there is no model.
        """
        path = Path(model)
        if path.exists():
            if weights is not None:
                raise ModelError(f"--checkpoint: '{path}' has weights of its own; leave one of the two out")
            return cls({"checkpoint": str(path.resolve())}, storage.load(path)[0], _run_of(path.resolve()))
        name = str(model)
        if ":" not in name and name not in ARCHITECTURES:
            hint = did_you_mean(name, list(ARCHITECTURES))
            raise ModelError(
                f"model: there is no '{name}'{hint}; give the folder of a model or of a run, a packed file, "
                f"package.module:function, or one of {', '.join(ARCHITECTURES)}"
            )
        extra = {"weights": str(Path(weights).resolve())} if weights is not None else {}
        return cls({"architecture": name, **extra})

    def data(self) -> tuple[dict[str, Any], int] | None:
        """Returns the `[data]` table and the seed of the run that left the model; None if there is none."""
        if self.run is None:
            return None
        settings = read_json(self.run / "settings.json")
        if not isinstance(settings.get("data"), dict) or "source" not in settings["data"]:
            raise ModelError(f"{self.run / 'settings.json'}: it does not say what data the run had; give --data")
        table = {key: value for key, value in settings["data"].items() if value is not None}
        if table["source"] == NOTHING:
            return None
        if ":" in str(table["source"]):  # the folder may come from anybody, and its data would be a call
            place = f"{self.run / 'settings.json'}: data.source"
            try:
                consent.check(str(table["source"]), (), place)
            except ModelError as error:
                raise ModelError(f"{error}, or give the data yourself with --data SOURCE") from error
        try:  # where the data lay is no setting, since it may differ between machines
            path = tomllib.loads((self.run / "recipe.toml").read_text("utf-8"))["data"].get("path")
        except (OSError, KeyError, tomllib.TOMLDecodeError):
            path = None
        return table | ({"path": path} if path else {}), int(settings["seed"])


def _run_of(path: Path) -> Path | None:
    return next((p for p in (path, path.parent.parent, path.parent) if (p / "settings.json").is_file()), None)


@contextmanager
def holding(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Gives the `[model]` table of a module in memory: while the block lasts, `held` builds copies of it."""
    name = str(id(module))
    _held[name] = module
    try:
        yield {"architecture": HELD, "arguments": {"name": name}}
    finally:
        del _held[name]


def held(name: str) -> nn.Module:
    """Builds a copy of the module in memory under `name`.

    Raises:
        ModelError: if it is not there any more: such a model lives as long as the process.
    """
    if name not in _held:
        raise ModelError("model: this one lived in the memory of another program; give module:function in its place")
    try:
        return copied(_held[name])
    except RuntimeError as error:  # torch copies no tensor that was computed from others
        raise ModelError(
            f"model: it cannot be copied ({str(error).splitlines()[0]}); "
            "if the old torch.nn.utils.weight_norm is in it, take "
            "torch.nn.utils.parametrizations.weight_norm"
        ) from error


def no_data(path: Path) -> FederatedData:
    """Stands in for data where a command needs none: one example of noise, and nothing to learn from or measure on.

    Args:
        path: what the examples look like and the number of classes, such as `3x32x32:10`.

    Raises:
        DataError: if it says something else.

    >>> no_data(Path("3x32x32:10")).describe()["shape"]
    [3, 32, 32]
    """
    try:
        sides, classes = str(path).split(":")
        shape, count = tuple(int(side) for side in sides.split("x")), int(classes)
        x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"no data: got '{path}', expected a shape and a number of classes such as 3x32x32:10"
        ) from error
    one, none = Arrays(x, torch.zeros(1, dtype=torch.int64)), _none(shape)
    names = tuple(str(i) for i in range(count))
    return FederatedData("no data", {"nobody": one}, none, none, none, count, names, Preprocess())


def _none(shape: tuple[int, ...]) -> Arrays:
    return Arrays(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64))


@torch.no_grad()
def classes_of(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Runs the model on noise and returns how many numbers it gives for one example.

    Raises:
        ModelError: if it does not take such examples, or gives something else than [n, classes].
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        raise ModelError(f"model: it holds {', '.join(map(str, kinds))}, but examples are float32; call model.float()")
    try:
        out = model.eval()(torch.randn(2, *shape))
    except Exception as error:  # whatever somebody's own network raises
        raise ModelError(
            f"--input: the model does not take examples of shape {list(shape)} "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); give the shape of one example"
        ) from error
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ModelError(f"model: expected outputs [n, classes] of a classifier, got {got} for 2 examples")
    return int(out.shape[1])
