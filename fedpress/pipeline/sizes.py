"""Fills in the sizes of a built-in network that a recipe leaves out: they follow from the data."""

from __future__ import annotations

from inspect import signature
from math import prod
from typing import Any

from pydantic import JsonValue

from fedpress.core.inputs import Shape
from fedpress.data import FederatedData
from fedpress.models import ARCHITECTURES


def completed_arguments(
    architecture: str, given: dict[str, JsonValue], shape: Shape, data: FederatedData
) -> dict[str, JsonValue]:
    """Returns the arguments of an architecture, with the sizes that were left out.

    Example: `mlp` without arguments, on a table of 26 inputs and 2 classes, gets
    `in_features = 26`. It has 10 classes by default, so it gets `num_classes = 2`, too.

    Args:
        architecture: name of the architecture. Only built-in ones are completed: which argument of
            a user's function is a size is not known.
        given: arguments of the recipe; they are never changed.
        shape: shape of one example.
        data: the data set, whose task says how many outputs there are.
    """
    if architecture not in ARCHITECTURES or isinstance(shape, dict):
        return given
    sizes = _sizes(shape, data)
    found = dict(given)
    for name, parameter in signature(ARCHITECTURES[architecture]).parameters.items():
        # A size that equals the default stays out, so that a spec is that of older versions.
        if name in sizes and name not in given and sizes[name] != parameter.default:
            found[name] = sizes[name]
    return found


def _sizes(shape: tuple[int, ...], data: FederatedData) -> dict[str, int]:
    """Returns the sizes that the data have, by the names of the architectures' arguments."""
    sizes: dict[str, Any] = {"in_features": prod(shape)}
    if len(shape) == 3:
        sizes["in_channels"] = shape[0]
        # An architecture with this argument takes squares only.
        if shape[1] == shape[2]:
            sizes["image_size"] = shape[1]
    # Without labels it is not known what the outputs mean.
    if data.labelled:
        sizes["num_classes"] = data.task.outputs
    return sizes
