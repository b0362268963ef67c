"""Names and structure of a model's outputs, and how a file keeps them in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fedpress.core.inputs import arguments
from fedpress.deploy.examples import (
    InputSpec,
    Structure,
    as_device,
    example_of,
    flatten,
    take_rows,
)
from fedpress.errors import ExportError
from fedpress.nn.resize import copied

# Metadata key for the structure of several outputs, as JSON (`deploy.examples.Structure`).
OUTPUTS = "outputs"
# Metadata key for the names of several outputs, as JSON, in files that have no names of their own.
NAMES = "output_names"


def outputs_of(model: nn.Module, given: InputSpec) -> tuple[Structure, list[str]]:
    """Runs the model once and returns the structure of its outputs, and a name for each tensor.

    A tensor that is returned twice becomes two outputs of the file.

    Raises:
        ExportError: if the model returns no tensor, or anything but tensors.
    """
    runs = copied(model).to("cpu", torch.float32).eval()
    args, named = arguments(take_rows(as_device(example_of(given)), 2))
    try:
        with torch.no_grad():
            found = runs(*args, **named)
    # The model fails. The capture, which comes next, reports that with a cure.
    except Exception:
        return 0, ["logits"]
    structure, _, names = flatten(found)
    if not names:
        raise ExportError(
            "the model returns no tensor",
            place="model",
            cure="make its forward return what a device should know",
        )
    return structure, names


@dataclass(frozen=True)
class NamedOutputs:
    """Names and structure of the outputs of a file whose format keeps neither.

    Attributes:
        names: name of each output, in order.
        structure: how the outputs are nested; 0: one array.
    """

    names: tuple[str, ...] = ("logits",)
    structure: Structure = 0

    @classmethod
    def of_model(cls, model: nn.Module, given: InputSpec) -> NamedOutputs:
        """Runs the model once.

        Raises:
            ExportError: if the model returns no tensor, or anything but tensors.
        """
        structure, names = outputs_of(model, given)
        return cls(tuple(names), structure)

    def metadata(self) -> dict[str, str]:
        """Returns the entries of the file's metadata; none for a model that returns one tensor."""
        if self.structure == 0:
            return {}
        return {OUTPUTS: json.dumps(self.structure), NAMES: json.dumps(self.names)}

    @classmethod
    def of_file(cls, metadata: Mapping[str, str], count: int) -> NamedOutputs:
        """Reads the names and the structure of `count` outputs from the file's metadata.

        A file of another program has no such entries: its outputs are named by their numbers.
        """
        if OUTPUTS in metadata:
            return cls(tuple(json.loads(metadata[NAMES])), json.loads(metadata[OUTPUTS]))
        if count == 1:
            return cls()
        return cls(tuple(f"output_{at}" for at in range(count)), list(range(count)))
