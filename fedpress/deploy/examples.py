"""What a model is called with and what it gives back: tensors in order, by name, or in dictionaries."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Example, arguments, tensors_of, with_tensors
from fedpress.errors import ExportError

Given = tuple[int, ...] | Example
"""The shape of one float32 example, or a batch of inputs."""

Structure = int | None | list["Structure"] | dict[str, "Structure"]
"""How outputs stand together, as JSON: a number is the place of a tensor in the list of all of them."""


def is_shape(given: Given) -> TypeGuard[tuple[int, ...]]:
    """Says whether it is the shape of one float32 example, not a batch."""
    return isinstance(given, tuple) and all(isinstance(size, int) for size in given)


def example_of(given: Given) -> Example:
    """Returns a batch: of a shape two rows of zeros, since `torch.export` takes a size of one for a constant."""
    if is_shape(given):
        return torch.zeros(2, *given)
    check_tensors(given, "the example")
    return given  # type: ignore[return-value]


def random_rows(given: Given, rows: int) -> Example:
    """Returns `rows` rows to time a model on: noise of a shape, or those of a batch."""
    if is_shape(given):
        chance = torch.Generator().manual_seed(0)
        return torch.randn(rows, *given, generator=chance)
    return take(as_device(example_of(given)), rows)


def check_tensors(example: Any, where: str) -> None:
    """Refuses what is no example.

    Raises:
        ExportError: naming what is wrong with it.
    """
    parts: list[Any] = []
    if isinstance(example, Tensor):
        parts = [example]
    elif isinstance(example, Mapping):
        parts = [*example.values()]
    elif isinstance(example, tuple):
        parts = [*example]
    odd = next((type(p).__name__ for p in parts if not isinstance(p, Tensor)), None)
    if not parts or odd:
        got = f"a {odd} inside" if odd else type(example).__name__
        raise ExportError(
            f"{where} is {got}",
            place="example",
            cure=(
                "give a tensor, a tuple of tensors in the order of forward's arguments, or a "
                "dictionary of tensors by their names, each with a batch dimension"
            ),
        )
    rows = {len(p) if p.dim() else None for p in parts}
    if len(rows) > 1 or None in rows or 0 in rows:
        sizes = ", ".join(str(list(p.shape)) for p in parts)
        raise ExportError(
            f"{where} has tensors of shapes {sizes}",
            place="example",
            cure="each must begin with the same batch size above 0",
        )


def rows_of(example: Example) -> int:
    """Returns the batch size."""
    return len(tensors_of(example)[0])


def take(example: Example, rows: int) -> Example:
    """Returns `rows` rows: the first ones, from the start again where there are not so many."""
    index = torch.arange(rows) % rows_of(example)
    return with_tensors(example, [t[index] for t in tensors_of(example)])


def in_parts(example: Example, size: int) -> Iterator[Example]:
    """Yields the rows in batches of `size`, the last one maybe smaller."""
    for parts in zip(*(t.split(size) for t in tensors_of(example)), strict=True):
        yield with_tensors(example, parts)


def as_device(example: Example) -> Example:
    """Returns the example as a file takes it: on the processor, floats as float32, whole numbers as they are."""
    found = []
    for t in tensors_of(example):
        wide = torch.float32 if t.is_floating_point() else t.dtype
        found.append(t.detach().to("cpu", wide))
    return with_tensors(example, found)


def ordered(model: nn.Module, example: Example) -> Example:
    """Returns a dictionary in the order of forward's arguments, in which `torch.export` lists them."""
    if not isinstance(example, Mapping):
        return example
    known = [name for name in inspect.signature(model.forward).parameters if name in example]
    return {name: example[name] for name in [*known, *(n for n in example if n not in known)]}


def by_name(example: Example, names: Sequence[str]) -> list[Tensor]:
    """Returns the tensors in the order of `names`, where these are those of a dictionary, else as they stand."""
    if isinstance(example, Mapping) and set(example) == set(names):
        return [example[name] for name in names]
    return tensors_of(example)


def names_of(model: nn.Module, example: Example) -> list[str]:
    """Returns a name for each tensor: that of forward's argument. One tensor alone is called `input`."""
    args, named = arguments(example)
    if not named and len(args) == 1:
        return ["input"]
    known = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    more = [f"input_{at}" for at in range(len(known), len(args))]
    return [*[*known, *more][: len(args)], *named]


def batch_dims(model: nn.Module, example: Example, spec: Any) -> dict[str, Any]:
    """Returns `spec` for every tensor of the call, in the form that `torch.export` takes as `dynamic_shapes`."""
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
    """Takes what a model gives back apart.

    Dictionaries (the outputs of transformers are some), tuples, lists and dataclasses may stand in each other; None
    stays None.

    Returns:
        How it stands together, the tensors in order, and a name for each: `logits` for one tensor alone, else the keys
        and places on the way to it.

    Raises:
        ExportError: if there is something else in it.

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


def together(structure: Structure, parts: Sequence[Any]) -> Any:
    """Puts `parts` where `structure` says: the reverse of `flatten`, with tuples and plain dictionaries.

    >>> together({"logits": 0, "hidden": [1, None]}, ["a", "b"])
    {'logits': 'a', 'hidden': ('b', None)}
    """
    if structure is None:
        return None
    if isinstance(structure, dict):
        return {key: together(inner, parts) for key, inner in structure.items()}
    if isinstance(structure, list):
        return tuple(together(inner, parts) for inner in structure)
    return parts[structure]


def main_output(names: Sequence[str]) -> int:
    """Returns the place of the output that says what the model decides: `logits`, else the first."""
    return names.index("logits") if "logits" in names else 0


def in_batches(run: Callable[[Example], list[Tensor]], example: Example, size: int) -> list[Tensor]:
    """Runs `example` in batches of `size` and returns the outputs of all rows.

    An output that has no batch dimension is given once for each batch.
    """
    found: list[list[Tensor]] = []
    whole: set[int] = set()
    for part in in_parts(example, size):
        rows, out = rows_of(part), run(part)
        whole |= {at for at, t in enumerate(out) if not t.dim() or len(t) != rows}
        found.append(out)
    columns = zip(*found, strict=True)
    return [torch.stack(c) if at in whole else torch.cat(c) for at, c in enumerate(columns)]
