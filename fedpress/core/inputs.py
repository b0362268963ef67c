"""A model's input is one tensor, or several by the names of forward's arguments (`NamedInputs`).

`len`, `x[rows]`, `x.to(device)` and `x.split` work alike on a tensor and on `NamedInputs`, so code
that splits, batches and moves examples does not distinguish them. `NamedInputs` is a small version
of the class TensorDict of the library tensordict.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from fedpress.errors import DataError, ModelError

# An index along the first dimension; None adds a dimension in front, as for a tensor.
Rows: TypeAlias = slice | Tensor | list[int] | None
# The shape of one example: a tuple, or a tuple for each input by name.
Shape: TypeAlias = tuple[int, ...] | dict[str, tuple[int, ...]]


class NamedInputs(Mapping[str, Tensor]):
    """A batch for a model with several inputs: tensors [n, ...] by the names of its arguments.

    These are the arguments of the model's `forward`. As for a tensor, `len(x)` is the number of
    examples, and `x[1:]` selects examples. `x["ids"]` is the tensor with the name "ids".

    Raises:
        DataError: if there is no tensor, a name cannot be an argument, a value is not a tensor with
            a first axis, or the tensors have different numbers of rows.

    >>> x = NamedInputs({"tokens": torch.ones(3, 5).long(), "lengths": torch.tensor([5, 2, 1])})
    >>> len(x), x[1:]["lengths"].tolist(), list(x)
    (3, [2, 1], ['tokens', 'lengths'])
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        _check(self._tensors)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor]) -> NamedInputs:
        """Makes the object without checks: inside `vmap`, tensors have no batch dimension."""
        made = object.__new__(cls)
        made._tensors = tensors
        return made

    @overload
    def __getitem__(self, at: str) -> Tensor: ...

    @overload
    def __getitem__(self, at: Rows) -> NamedInputs: ...

    def __getitem__(self, at: str | Rows) -> Tensor | NamedInputs:
        """Returns the tensor of a name, or the examples of some rows."""
        if isinstance(at, str):
            return self._tensors[at]
        return self.map(lambda t: t[at])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of examples, not of names."""
        # All tensors have the same number of rows.
        return len(next(iter(self._tensors.values())))

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {list(t.shape)} {t.dtype}" for name, t in self._tensors.items())
        return f"NamedInputs({shown})"

    def map(self, change: Callable[[Tensor], Tensor]) -> NamedInputs:
        """Returns the result of `change` for each tensor."""
        return self._of({name: change(t) for name, t in self._tensors.items()})

    def to(self, at: torch.device | str) -> NamedInputs:
        """Returns the examples on another device."""
        return self.map(lambda t: t.to(at))

    def split(self, size: int) -> tuple[NamedInputs, ...]:
        """Returns parts of `size` examples; the last may be smaller."""
        return self._from_columns([t.split(size) for t in self._tensors.values()])

    def tensor_split(self, parts: int) -> tuple[NamedInputs, ...]:
        """Returns `parts` parts of nearly equal size."""
        return self._from_columns([t.tensor_split(parts) for t in self._tensors.values()])

    def _from_columns(self, columns: list[tuple[Tensor, ...]]) -> tuple[NamedInputs, ...]:
        """Returns the parts of a batch: part i has part i of every tensor.

        Args:
            columns: for each tensor, its parts.
        """
        found = []
        for row in zip(*columns, strict=True):
            found.append(self._of(dict(zip(self._tensors, row, strict=True))))
        return tuple(found)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; `to` puts all on one device."""
        return next(iter(self._tensors.values())).device


Inputs: TypeAlias = Tensor | NamedInputs
"""A batch of examples [n, ...] in the form that fedpress uses everywhere inside."""

Example: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""A batch as a user may give it to `forward`: one tensor, several tensors in the order of forward's
arguments, or several by name. It is wider than `Inputs`, which has no tuples."""


def _check(tensors: Mapping[str, Any]) -> None:
    place = "examples by name"
    if not tensors:
        raise DataError("there is no input", place=place, cure="give at least one tensor")
    for name, t in tensors.items():
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise DataError(
                f"{name!r} cannot be the name of an argument",
                place=place,
                cure="name each input as forward names its argument, such as 'input_ids'",
            )
        if not isinstance(t, Tensor) or not t.dim():
            got = "a tensor of no dimension" if isinstance(t, Tensor) else type(t).__name__
            raise DataError(
                f"'{name}' is {got}",
                place=place,
                cure="give a tensor whose first dimension counts examples",
            )
    if len(set(map(len, tensors.values()))) > 1:
        counts = ", ".join(f"{len(t)} of '{name}'" for name, t in tensors.items())
        raise DataError(
            f"the inputs have different numbers of rows: {counts}",
            place=place,
            cure="give one row of each for every example",
        )


def as_inputs(x: Inputs | Mapping[str, Tensor]) -> Inputs:
    """Returns a dictionary of tensors as `NamedInputs`; other inputs unchanged."""
    # `NamedInputs` is a Mapping too, and needs no second check of its tensors.
    if isinstance(x, Mapping) and not isinstance(x, NamedInputs):
        return NamedInputs(x)
    return x


def arguments(x: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Returns the arguments for calling a model: those by position, and those by name.

    >>> arguments({"ids": torch.tensor([1])})
    ((), {'ids': tensor([1])})
    """
    if isinstance(x, Mapping):
        return (), {name: x[name] for name in x}
    if isinstance(x, Tensor):
        return (x,), {}
    return tuple(x), {}


def call(model: Callable[..., Any], x: Example) -> Any:
    """Calls `model` with a batch and returns its result.

    Raises:
        ModelError: if the names of the inputs are not those of forward's arguments.
    """
    if isinstance(x, Tensor):
        return model(x)
    args, named = arguments(x)
    try:
        return model(*args, **named)
    # Python's error names only the first wrong argument. It may also come from inside of forward.
    except TypeError as problem:
        # Arguments by position have no names to compare.
        mismatch = "" if args else _name_mismatch(model, named)
        if not mismatch:
            raise
        raise ModelError(
            mismatch, place="model", cure="name the inputs as forward names its arguments"
        ) from problem


def positional(model: nn.Module, x: Example) -> tuple[Tensor, ...]:
    """Returns the inputs in the order of forward's arguments, to pass them by position.

    Raises:
        ModelError: if the inputs are not forward's first arguments, or an input is keyword-only.

    >>> positional(nn.Linear(2, 1), NamedInputs({"input": torch.zeros(1, 2)}))
    (tensor([[0., 0.]]),)
    """
    if not isinstance(x, Mapping):
        return arguments(x)[0]
    by_position = [p.name for p in _parameters(model) if p.kind is not p.KEYWORD_ONLY]
    ordered = by_position[: len(list(x))]  # len(x) alone is the number of examples
    if set(ordered) != set(x):
        raise ModelError(
            f"forward begins with {_quoted(ordered)}, the examples have {_quoted(list(x))}",
            place=type(model).__name__,
            cure="put these arguments first in forward: the graph is traced by position",
        )
    return tuple(x[name] for name in ordered)


def join(parts: Sequence[Inputs]) -> Inputs:
    """Concatenates the examples of batches; all batches have the same input names."""
    named = [tensors_by_name(part) for part in parts]
    joined = {name: torch.cat([one[name] for one in named]) for name in named[0]}
    if isinstance(parts[0], NamedInputs):
        return NamedInputs._of(joined)
    return joined[""]


def tensors_by_name(x: Inputs) -> dict[str, Tensor]:
    """Returns the tensors by name; a single tensor has the name ""."""
    if not isinstance(x, NamedInputs):
        return {"": x}
    return {name: x[name] for name in x}


def tensors_of(x: Example) -> list[Tensor]:
    """Returns the tensors in the order of `arguments`."""
    args, named = arguments(x)
    return [*args, *named.values()]


def with_tensors(x: Example, tensors: Sequence[Tensor]) -> Example:
    """Returns inputs of the same type as `x` with other `tensors`, in the order of `tensors_of`."""
    if isinstance(x, Tensor):
        return tensors[0]
    if isinstance(x, Mapping):
        named = dict(zip(x, tensors, strict=True))
        if isinstance(x, NamedInputs):
            # Without checks: the new tensors need not have a batch dimension.
            return NamedInputs._of(named)
        return named
    return tuple(tensors)


@overload
def map_inputs(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor: ...


@overload
def map_inputs(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs: ...


@overload
def map_inputs(x: Example, change: Callable[[Tensor], Tensor]) -> Example: ...


def map_inputs(x: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Returns inputs of the same type as `x`, with the result of `change` for each tensor."""
    return with_tensors(x, [change(t) for t in tensors_of(x)])


def signature_of(x: Inputs) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Returns name, shape and dtype of each input of one example.

    If two batches have equal signatures, the same network can take both.

    >>> signature_of(torch.zeros(2, 3))
    (('', (3,), torch.float32),)
    """
    found = []
    for name, t in tensors_by_name(x).items():
        found.append((name, tuple(t.shape[1:]), t.dtype))
    # Sorted, because the order of names in a dictionary does not matter for the call.
    return tuple(sorted(found, key=lambda part: part[0]))


def shape_of(x: Inputs) -> Shape:
    """Returns the shape of one example: a tuple, or a dictionary of tuples by name."""
    shapes = {name: tuple(t.shape[1:]) for name, t in tensors_by_name(x).items()}
    if isinstance(x, NamedInputs):
        return shapes
    return shapes[""]


def dtype_of(x: Inputs) -> str | dict[str, str]:
    """Returns the dtype that a network gets after `Preprocess`: "float32", "int64" or "bool".

    This holds for a `Preprocess` without means; with means it gives float32. With several inputs,
    there is a dtype for each name; only then it may be "bool".
    """
    # `Preprocess` turns every other type, bytes included, into float32.
    whole = {torch.int64: "int64"}
    if not isinstance(x, NamedInputs):
        return whole.get(x.dtype, "float32")
    # Among several inputs, booleans stay booleans: they are usually masks.
    whole[torch.bool] = "bool"
    return {name: whole.get(t.dtype, "float32") for name, t in x.items()}


def shapes_in(shape: Shape) -> list[tuple[int, ...]]:
    """Returns the shapes of all inputs."""
    if isinstance(shape, dict):
        return list(shape.values())
    return [shape]


def shape_text(shape: Shape) -> str:
    """Returns a shape as text for errors.

    >>> shape_text((3, 8, 8)), shape_text({"tokens": (12,), "lengths": ()})
    ('[3, 8, 8]', 'tokens [12], lengths []')
    """
    if isinstance(shape, dict):
        return ", ".join(f"{name} {list(sizes)}" for name, sizes in shape.items())
    return str(list(shape))


def is_image(x: Inputs) -> TypeGuard[Tensor]:
    """Returns whether examples are one tensor of images [n, C, H, W].

    It is False for `NamedInputs` with an image: augmentation and resizing do not change them.
    """
    return isinstance(x, Tensor) and x.dim() == 4


def inputs_text(x: Inputs) -> str:
    """Returns shape and dtype of one example as text for errors.

    >>> inputs_text(torch.zeros(2, 3))
    '[3] float32'
    """
    words = []
    for name, t in tensors_by_name(x).items():
        kind = str(t.dtype).removeprefix("torch.")
        words.append(f"{name} {list(t.shape[1:])} {kind}".strip())
    return ", ".join(words)


def _parameters(model: Callable[..., Any]) -> list[inspect.Parameter]:
    forward = model.forward if isinstance(model, nn.Module) else model
    return list(inspect.signature(forward).parameters.values())


def _name_mismatch(model: Callable[..., Any], x: Mapping[str, Tensor]) -> str:
    """Describes how the inputs' names differ from forward's arguments; "" if all fit."""
    needed, accepted, takes_any = [], set(), False
    for parameter in _parameters(model):
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            if parameter.default is parameter.empty:
                needed.append(parameter.name)
            if parameter.kind is not parameter.POSITIONAL_ONLY:
                accepted.add(parameter.name)

    missing = [name for name in needed if name not in x]
    unknown = [name for name in x if name not in accepted and not takes_any]
    parts = []
    if missing:
        parts.append(f"also needs {_quoted(missing)}")
    if unknown:
        parts.append(f"does not take {_quoted(unknown)}")
    if not parts:
        return ""
    return f"the model {' and '.join(parts)}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _unflatten(tensors: Any, names: Any) -> NamedInputs:
    return NamedInputs._of(dict(zip(names, tensors, strict=True)))


# Without this, vmap and torch.export would treat `NamedInputs` as a constant, not as tensors.
register_pytree_node(
    NamedInputs,
    lambda x: ([x[name] for name in x], tuple(x)),
    _unflatten,
    serialized_type_name="fedpress.core.inputs.NamedInputs",
)
