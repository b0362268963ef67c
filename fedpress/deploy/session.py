"""A `Session` is an exported file, loaded into its runtime; it is called like the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpress.deploy.examples import Structure, main_output, unflatten
from fedpress.deploy.processor import conditions
from fedpress.deploy.raw_columns import RawColumns
from fedpress.errors import ExportError


@dataclass(frozen=True)
class FileInput:
    """One input of a file.

    Attributes:
        name: name of the input in the file.
        shape: size of each axis; a string such as "batch" stands for any size.
        dtype: the numpy dtype of the input.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True, eq=False)
class Session:
    """A file loaded into its runtime. It is called like the model, with numpy arrays for tensors.

    Arguments are passed by position in the order of `inputs`, or by name. A single output is
    returned as an array. Several outputs are returned in tuples and dictionaries, nested as the
    model returns them.

    Attributes:
        path: the file.
        runtime: name of the runtime, such as "onnxruntime".
        inputs: all inputs, in order.
        outputs: names of all outputs, in order.
        structure: how outputs are nested in tuples and dictionaries; 0: one array (see
            `deploy.examples.Structure`).
        threads: number of threads; 0: the runtime chooses.
        options: options that were set in the runtime (see `deploy.processor`).
        compute: runs the file: maps a list of arrays in the order of `inputs` to a list of arrays
            in the order of `outputs`.
        columns: the preparation inside the file, which then takes raw columns by name. One array by
            position is of standardised inputs: it is turned back into raw columns. None: the file
            takes standardised inputs.
    """

    path: str
    runtime: str
    inputs: tuple[FileInput, ...]
    outputs: tuple[str, ...]
    compute: Callable[[list[np.ndarray]], Sequence[np.ndarray]]
    structure: Structure = 0
    threads: int = 0
    options: Mapping[str, str] = field(default_factory=dict)
    columns: RawColumns | None = None

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs the file.

        Raises:
            ExportError: if an input is missing or unknown, if an input of integers or bools gets
                other numbers, or if the runtime cannot run the file.
        """
        return unflatten(self.structure, self.flat(*args, **named))

    def flat(self, *args: Any, **named: Any) -> Sequence[np.ndarray]:
        """Runs the file and returns all outputs in order."""
        return self.compute(self.in_order(args, named))

    def main(self, *args: Any, **named: Any) -> np.ndarray:
        """Runs the file and returns the output `logits`, or else the first output."""
        return self.flat(*args, **named)[main_output(self.outputs)]

    def conditions(self) -> dict[str, Any]:
        """Returns runtime, version, threads, options and processor as plain JSON values."""
        return conditions(self.runtime, threads=self.threads, options=dict(self.options))

    def in_order(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[np.ndarray]:
        """Returns the arguments as arrays in the order of `inputs`.

        Raises:
            ExportError: if an input is missing or unknown, or if an input of integers or bools gets
                other numbers.
        """
        # A single dictionary holds all inputs by name.
        if len(args) == 1 and isinstance(args[0], Mapping):
            named, args = {**args[0], **named}, ()
        if self.columns is not None and len(args) == 1 and not named:
            return self.columns.arrays(np.asarray(args[0]))
        names = [each.name for each in self.inputs]
        # An input that is given twice, by position and by name, takes the value given by name.
        given = {**dict(zip(names, args, strict=False)), **named}
        missing = [name for name in names if name not in given]
        unknown = sorted(given.keys() - set(names))
        # `zip` above has silently dropped arguments beyond the file's inputs.
        if len(args) > len(names):
            unknown = [f"{len(args)} by position", *unknown]
        if missing or unknown:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has extra {', '.join(unknown)}"
            raise ExportError(
                f"the call {wrong}", place="x", cure=f"{self.path} takes {', '.join(names)}"
            )
        return [_converted(each, given[each.name], self.path) for each in self.inputs]


def _converted(file_input: FileInput, value: Any, path: str) -> np.ndarray:
    """Returns `value` in the dtype of the input.

    Floats may lose digits. An input of integers or bools takes only integers and bools: of floats
    the fraction would be lost.
    """
    found = np.asarray(value)
    # Text, which numpy would store with a fixed length.
    if file_input.dtype == object and found.dtype.kind in "UO":
        return found.astype(object)
    if found.dtype == file_input.dtype:
        return np.ascontiguousarray(found)
    takes_floats = np.issubdtype(file_input.dtype, np.floating)
    is_integer = np.issubdtype(found.dtype, np.integer) or found.dtype == bool
    if not takes_floats and not is_integer:
        raise ExportError(
            f"'{file_input.name}' is {found.dtype}, but {path} takes {file_input.dtype}",
            place="x",
            cure="give whole numbers of that type",
        )
    return np.ascontiguousarray(found, file_input.dtype)
