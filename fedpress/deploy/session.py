"""A loaded file: what it takes, how it is run here, and a call that gives back what the model would."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpress.deploy.examples import Structure, main_output, together
from fedpress.deploy.processor import conditions
from fedpress.errors import ExportError


@dataclass(frozen=True)
class Port:
    """One input of a file.

    Attributes:
        name: as the file calls it.
        shape: its sizes; a word stands for any size.
        dtype: of its numbers.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Session:
    """A file that was loaded into its runtime; call it like the model, with arrays in the place of tensors.

    Arguments go by position in the order of `inputs`, or by name. One output comes as an array; several come as the
    model gave them: a tuple, or a dictionary by its keys.

    Attributes:
        path: the file.
        runtime: what runs it.
        inputs: what it takes.
        outputs: names of all outputs, in order.
        structure: how the outputs stand together.
        threads: on how many it computes; 0: as the runtime likes.
        options: what the runtime was told (`deploy.processor`).
        compute: runs it on arrays in the order of `inputs`, and returns those of `outputs`.
    """

    path: str
    runtime: str
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    compute: Callable[[list[np.ndarray]], Sequence[np.ndarray]]
    structure: Structure = 0
    threads: int = 0
    options: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs the file.

        Raises:
            ExportError: if an input is missing, unknown or of another type, or if the runtime cannot run it.
        """
        return together(self.structure, self.flat(*args, **named))

    def flat(self, *args: Any, **named: Any) -> Sequence[np.ndarray]:
        """Runs the file and returns all outputs in order."""
        return self.compute(self.in_order(args, named))

    def main(self, *args: Any, **named: Any) -> np.ndarray:
        """Runs the file and returns the output that is called `logits`, else the first."""
        return self.flat(*args, **named)[main_output(self.outputs)]

    def conditions(self) -> dict[str, Any]:
        """Returns runtime, version, threads, options and processor as plain JSON values."""
        return conditions(self.runtime, threads=self.threads, options=dict(self.options))

    def in_order(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[np.ndarray]:
        """Returns the arguments as `compute` takes them.

        Raises:
            ExportError: if an input is missing, unknown or of another type.
        """
        if len(args) == 1 and isinstance(args[0], Mapping):
            named, args = {**args[0], **named}, ()
        names = [port.name for port in self.inputs]
        given = {**dict(zip(names, args, strict=False)), **named}
        if len(args) > len(names) or given.keys() != set(names):
            extra = [f"{len(args)} by position"] * (len(args) > len(names)) + sorted(
                given.keys() - set(names)
            )
            lacks = [name for name in names if name not in given]
            wrong = f"lacks {', '.join(lacks)}" if lacks else f"has no {', '.join(extra)}"
            raise ExportError(
                f"the call {wrong}", place="x", cure=f"{self.path} takes {', '.join(names)}"
            )
        return [_as(port, given[port.name], self.path) for port in self.inputs]


def _as(port: Port, value: Any, path: str) -> np.ndarray:
    """Returns `value` as the type of `port`, where that loses nothing but digits of floats."""
    found = np.asarray(value)
    if found.dtype == port.dtype:
        return np.ascontiguousarray(found)
    floats = np.issubdtype(port.dtype, np.floating)
    if not (floats or np.issubdtype(found.dtype, np.integer) or found.dtype == bool):
        raise ExportError(
            f"'{port.name}' is {found.dtype}, but {path} takes {port.dtype}",
            place="x",
            cure="give whole numbers of that type",
        )
    return np.ascontiguousarray(found, port.dtype)
