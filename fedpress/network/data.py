"""Reads a client's own data (arrays, a table, texts or images) in the layout that the model needs.

The server's offer (its first message) says which layout this is: columns, labels and input shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpress.core.examples import Arrays
from fedpress.core.inputs import NamedInputs, shape_of, shape_text, tensors_by_name
from fedpress.data import images
from fedpress.data.csv import delimiter_of
from fedpress.data.labelled import KINDS, SUFFIXES
from fedpress.data.paths import TABLES
from fedpress.data.preparation import Preparation
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError
from fedpress.stages.federate.offer import Offer

ARRAYS = (".safetensors", ".npz")
"""Suffixes of files of arrays."""
INPUT = "x."
"""Prefix of the arrays of a model with several inputs. An argument of forward follows: `x.ids`."""


@dataclass(eq=False)
class ClientData:
    """The data that `fedpress client --data PATH` names.

    Attributes:
        path: a file of arrays (.safetensors or .npz with `x` and `y`), a table (.csv, .parquet), a
            text (.txt) or a folder of texts, or a folder with one subfolder of images for each
            label, such as `cat/1.png`.
        keys: how this table is read, where it differs from the server's: delimiter, decimal and
            encoding, as in `[data]` of a recipe.
    """

    path: Path
    keys: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise DataError(
                "there is no such file or folder", place=f"'{self.path}'", cure="check the path"
            )
        known = self.path.suffix in (*ARRAYS, *SUFFIXES)
        if not self.path.is_dir() and not known:
            raise DataError(
                f"got '{self.path.suffix}'",
                place=f"'{self.path}'",
                cure=f"give {', '.join((*ARRAYS, *SUFFIXES))}, or a folder label/image.png",
            )

    def arrays(self, offer: Offer) -> Arrays:
        """Returns the examples in the layout that the offered model needs.

        Raises:
            DataError: if the data cannot be read, have another layout, or lack examples. For
                another layout the error says which was found and which is needed.
        """
        about = None if offer.inputs is None else Preparation.from_json(offer.inputs)
        kind = None if about is None else KINDS.get(about.kind)
        if about is not None and kind is not None and kind.takes(self.path):
            settings = self._settings(offer)
            about = replace(about, decimal=settings.decimal)
            # Columns and word lists come from the server, so equal rows are encoded equally
            # everywhere. The client's side of the stage will standardise the examples.
            found = kind.read(self.path, about, settings, offer.task)[0]
        elif self.path.is_dir():
            found = self._images(offer)
        elif self.path.suffix in ARRAYS:
            found = read_arrays(self.path)
        else:
            what = "table" if self.path.suffix in TABLES else "text"
            raise DataError(
                f"the server's data are no {what}",
                place=f"'{self.path}'",
                cure="give prepared arrays, a .safetensors or .npz file with x and y",
            )
        # Checked before training: the errors of torch would not say what is wrong with the file.
        check_layout(found, offer, f"'{self.path}'")
        return found

    def _settings(self, offer: Offer) -> DataSettings:
        """Returns how the file is read: as the server's, where it does not differ."""
        how = {**offer.reading.model_dump(), **self.keys}
        source = TABLES.get(self.path.suffix, "text")
        if source == "csv" and "delimiter" not in self.keys:
            how["delimiter"] = delimiter_of(self.path, how["delimiter"], how["encoding"])
            # The server's decimal comma cannot be meant in a table whose columns it separates.
            if how["decimal"] == how["delimiter"]:
                how["decimal"] = "."
        return DataSettings.model_validate(
            {"source": source, "path": self.path, "label_column": offer.labels, **how}
        )

    def _images(self, offer: Offer) -> Arrays:
        """Reads a folder of images, and scales them to the model's input size."""
        shape = offer.spec.input_shape
        # The shape must be [channels, size, size]: images are scaled to a square.
        if isinstance(shape, dict) or len(shape) != 3 or shape[1] != shape[2]:
            raise DataError(
                f"the model takes examples of shape {shape_text(shape)}, no square images",
                place=f"'{self.path}'",
                cure="give prepared arrays, a .safetensors or .npz file with x and y",
            )
        names = list(map(str, offer.task.names))
        # Folders and files are sorted, so that their order is the same on each machine.
        files, y = [], []
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            # A folder of another name has no class in this run; its images are left out.
            if folder.name not in names:
                continue
            own = sorted(path for path in folder.iterdir() if path.is_file())
            files += own
            y += [names.index(folder.name)] * len(own)
        if not files:
            raise DataError(
                f"it has none of the folders {', '.join(names)}",
                place=f"'{self.path}'",
                cure="put the images into a folder for each label: label/image.png",
            )
        x = images.decode(files, where=lambda i: f"image {i}", size=shape[1], like=0)
        return Arrays(x, torch.tensor(y))


def check_layout(found: Arrays, offer: Offer, place: str) -> None:
    """Checks that examples and targets fit the offered model and task.

    Args:
        found: the client's examples and targets.
        offer: the server's offer, with the model and the task.
        place: the file or folder, for errors.

    Raises:
        DataError: if they do not fit, if an example has NaN or infinite values, or if there are no
            examples. The error shows shapes, but no value of the data: the server receives it.
    """
    wanted = offer.spec.input_shape
    if shape_of(found.x) != wanted:
        raise DataError(
            f"its examples have the shape {shape_text(shape_of(found.x))}, but the recipe needs "
            f"{shape_text(wanted)}",
            place=place,
            cure="prepare them as the recipe does",
        )
    # One NaN would make all weights NaN after the first step.
    for name, part in tensors_by_name(found.x).items():
        if part.is_floating_point() and not bool(part.isfinite().all()):
            raise DataError(
                f"some values of {name or 'x'} are NaN or infinite",
                place=place,
                cure="fill them, or leave these examples out",
            )
    try:
        offer.task.check_targets(found.y)
    except DataError as error:
        error.place = place
        raise
    if not len(found):
        raise DataError("it has no examples", place=place, cure="give some")


def read_arrays(path: Path) -> Arrays:
    """Reads arrays from a .npz or .safetensors file.

    Args:
        path: a file with the examples `x` and the targets `y`. If the model has several inputs,
            there is one array for each input, such as `x.ids` and `x.mask`.

    Raises:
        DataError: if the file cannot be read, or does not have these arrays.
    """
    try:
        if path.suffix == ".npz":
            # No pickles: loading one can run any code.
            with np.load(path, allow_pickle=False) as file:
                tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            tensors = load_file(path)
    except (OSError, EOFError, ValueError, TypeError, SafetensorError, BadZipFile) as error:
        raise DataError(
            f"it cannot be read ({error})", place=f"'{path}'", cure="write it anew"
        ) from error
    inputs = {name[len(INPUT) :]: t for name, t in tensors.items() if name.startswith(INPUT)}
    if "y" not in tensors or not (inputs or "x" in tensors):
        raise DataError(
            f"it holds {', '.join(tensors) or 'nothing'}",
            place=f"'{path}'",
            cure="write the examples as x (or x.NAME for each input) and the targets as y",
        )
    try:
        return Arrays(NamedInputs(inputs) if inputs else tensors["x"], tensors["y"])
    except DataError as error:
        error.place = f"'{path}'"
        raise
    except TypeError as error:
        raise DataError(
            "a tensor is a single number",
            place=f"'{path}'",
            cure="give x and y a first dimension, one entry for each example",
        ) from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes arrays as a .safetensors file that `read_arrays` can read."""
    parts = tensors_by_name(arrays.x)
    several = isinstance(arrays.x, NamedInputs)
    # Cloned, because safetensors refuses tensors that share memory.
    tensors: dict[str, Tensor] = {
        (f"{INPUT}{name}" if several else "x"): part.contiguous().clone()
        for name, part in parts.items()
    }
    save_file({**tensors, "y": arrays.y.contiguous().clone()}, path)
