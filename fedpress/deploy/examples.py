"""Converts inputs and outputs of models between tensors, dictionaries and nested containers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Example, arguments, tensors_of, with_tensors
from fedpress.errors import ExportError

InputSpec = tuple[int, ...] | Example
"""The shape of one float32 example, or a batch of inputs."""

Structure = int | None | list["Structure"] | dict[str, "Structure"]
"""The containers of a model's outputs, as JSON. A number is the index of a tensor in a flat list.

Example: `{"logits": 0, "hidden": [1, 2]}` is a dictionary whose second value is a pair.
"""


def is_shape(given: InputSpec) -> TypeGuard[tuple[int, ...]]:
    """Whether `given` is the shape of one float32 example, and not a batch of inputs."""
    return isinstance(given, tuple) and all(isinstance(size, int) for size in given)


def example_of(given: InputSpec) -> Example:
    """Returns the batch, or two rows of zeros if `given` is a shape."""
    # Two rows, because torch.export treats a batch size of one as a constant.
    if is_shape(given):
        return torch.zeros(2, *given)
    check_tensors(given, "the example")
    return given  # type: ignore[return-value]


def random_rows(given: InputSpec, rows: int) -> Example:
    """Returns a batch of `rows` rows: normal noise if `given` is a shape, else rows of `given`."""
    if is_shape(given):
        # A fixed seed: every model and file is measured on the same inputs.
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, *given, generator=generator)
    return take_rows(as_device(example_of(given)), rows)


def check_tensors(example: Any, where: str) -> None:
    """Checks that `example` is a tensor, or a tuple or mapping of tensors, with equal batch sizes.

    Raises:
        ExportError: if the example has another type or unequal batch sizes. The message calls the
            example `where`.
    """
    parts: list[Any] = []
    if isinstance(example, Tensor):
        parts = [example]
    elif isinstance(example, Mapping):
        parts = [*example.values()]
    elif isinstance(example, tuple):
        parts = [*example]

    others = [type(p).__name__ for p in parts if not isinstance(p, Tensor)]
    if not parts or others:
        got = type(example).__name__
        if others:
            got = f"a {others[0]} inside"
        raise ExportError(
            f"{where} is {got}",
            place="example",
            cure=(
                "give a tensor, a tuple of tensors in the order of forward's arguments, or a "
                "dictionary of tensors by their names, each with a batch dimension"
            ),
        )
    # A number without dimensions has no rows.
    rows = {len(p) if p.dim() else None for p in parts}
    if len(rows) > 1 or None in rows or 0 in rows:
        sizes = ", ".join(str(list(p.shape)) for p in parts)
        raise ExportError(
            f"{where} has tensors of shapes {sizes}",
            place="example",
            cure="each must begin with the same batch size above 0",
        )


def rows_of(example: Example) -> int:
    """Returns the number of rows, that is, the batch size."""
    return len(tensors_of(example)[0])


def take_rows(example: Example, rows: int) -> Example:
    """Returns the first `rows` rows; a shorter batch is repeated from the start."""
    # Repeated, not padded with zeros: lengths and masks of 0 would be no valid rows.
    index = torch.arange(rows) % rows_of(example)
    return with_tensors(example, [t[index] for t in tensors_of(example)])


def in_parts(example: Example, size: int) -> Iterator[Example]:
    """Yields the rows in batches of `size`; the last may be smaller."""
    columns = [t.split(size) for t in tensors_of(example)]
    for parts in zip(*columns, strict=True):
        yield with_tensors(example, parts)


def as_device(example: Example) -> Example:
    """Returns the example as an exported file takes it: on the CPU, floats as float32.

    Integers keep their dtype.
    """
    found = []
    for t in tensors_of(example):
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        found.append(t.detach().to("cpu", dtype))
    return with_tensors(example, found)


def ordered(model: nn.Module, example: Example) -> Example:
    """Sorts a dictionary into the order of forward's arguments, as `torch.export` lists them."""
    if not isinstance(example, Mapping):
        return example
    # Names that forward does not list go into its **kwargs.
    known = [name for name in inspect.signature(model.forward).parameters if name in example]
    others = [name for name in example if name not in known]
    return {name: example[name] for name in known + others}


def by_name(example: Example, names: Sequence[str]) -> list[Tensor]:
    """Returns the tensors in the order of `names`, if these are the keys of the example.

    Otherwise they keep their order.
    """
    if isinstance(example, Mapping) and set(example) == set(names):
        return [example[name] for name in names]
    return tensors_of(example)


def names_of(model: nn.Module, example: Example) -> list[str]:
    """Returns the name of forward's argument for each tensor; `input` for a lone unnamed tensor."""
    args, named = arguments(example)
    if not named and len(args) == 1:
        return ["input"]
    names = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    # Tensors beyond the named arguments go into forward's *args, so they get numbers as names.
    for at in range(len(names), len(args)):
        names.append(f"input_{at}")
    return [*names[: len(args)], *named]


def batch_dims(model: nn.Module, example: Example, spec: Any) -> dict[str, Any]:
    """Returns `dynamic_shapes` for `torch.export`: `spec` for every tensor in the inputs."""
    args, named = arguments(example)
    bound = inspect.signature(model.forward).bind(*args, **named).arguments

    def each(value: Any) -> Any:
        if isinstance(value, Tensor):
            return spec
        if isinstance(value, Mapping):
            return {key: each(inner) for key, inner in value.items()}
        return tuple(each(inner) for inner in value)

    return {name: each(value) for name, value in bound.items()}


def flatten(given: Any) -> tuple[Structure, list[Tensor], list[str]]:
    """Flattens the outputs of a model.

    The outputs may be nested dictionaries (such as the outputs of transformers), tuples, lists and
    dataclasses; None stays None.

    Returns:
        The structure, the tensors in order, and a name for each: `logits` if the model returns just
        a tensor, else the keys and indices that lead to the tensor, joined by `_`.

    Raises:
        ExportError: if an output is of another type.

    >>> flatten({"logits": torch.ones(2), "hidden": (torch.zeros(1), None)})[::2]
    ({'logits': 0, 'hidden': [1, None]}, ['logits', 'hidden_0'])
    """
    tensors: list[Tensor] = []
    names: list[str] = []

    def walk(value: Any, path: tuple[str, ...]) -> Structure:
        if value is None:
            return None
        if isinstance(value, Tensor):
            tensors.append(value)
            names.append("_".join(path) or "logits")
            return len(tensors) - 1
        if isinstance(value, Mapping):
            return {str(key): walk(inner, (*path, str(key))) for key, inner in value.items()}
        # Named tuples become dictionaries, because JSON has no named tuples.
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {key: walk(getattr(value, key), (*path, key)) for key in value._fields}
        if isinstance(value, tuple | list):
            start = path or ("output",)
            return [walk(inner, (*start, str(at))) for at, inner in enumerate(value)]
        if is_dataclass(value):
            return {f.name: walk(getattr(value, f.name), (*path, f.name)) for f in fields(value)}
        where = f"under '{'.'.join(path)}' " if path else ""
        raise ExportError(
            f"the model returns a {type(value).__name__} {where}",
            place="model",
            cure=(
                "files hold tensors alone: leave it out of what forward returns (caches of the "
                "transformers library: model.config.use_cache = False)"
            ),
        )

    return walk(given, ()), tensors, names


def unflatten(structure: Structure, parts: Sequence[Any]) -> Any:
    """Rebuilds the structure from `parts`: the reverse of `flatten`.

    Lists, tuples and dataclasses become tuples and dictionaries.

    >>> unflatten({"logits": 0, "hidden": [1, None]}, ["a", "b"])
    {'logits': 'a', 'hidden': ('b', None)}
    """
    if structure is None:
        return None
    if isinstance(structure, dict):
        return {key: unflatten(inner, parts) for key, inner in structure.items()}
    if isinstance(structure, list):
        return tuple(unflatten(inner, parts) for inner in structure)
    return parts[structure]


def main_output(names: Sequence[str]) -> int:
    """Returns the index of the output that holds the prediction: `logits`, else the first."""
    return names.index("logits") if "logits" in names else 0


def in_batches(run: Callable[[Example], list[Tensor]], example: Example, size: int) -> list[Tensor]:
    """Runs `example` in batches of `size` and returns the outputs of all rows.

    Outputs with a batch dimension are concatenated; others are stacked, one for each batch.
    """
    found: list[list[Tensor]] = []
    has_batch: list[bool] = []
    for part in in_parts(example, size):
        outputs = run(part)
        here = [t.dim() > 0 and len(t) == rows_of(part) for t in outputs]
        # An output may have as many entries as the batch by chance. If the last batch is smaller,
        # such an output is recognised there.
        has_batch = [a and b for a, b in zip(has_batch or here, here, strict=True)]
        found.append(outputs)

    joined = []
    for batched, parts in zip(has_batch, zip(*found, strict=True), strict=True):
        joined.append(torch.cat(parts) if batched else torch.stack(parts))
    return joined
