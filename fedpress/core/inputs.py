"""What a model is called with: one tensor, or several by the names of forward's arguments.

`NamedInputs` is to a dictionary of tensors what a tensor is to its rows: `len`, `x[rows]`, `x.to(device)` and `x.split`
work alike on both, so code that deals, batches and moves examples does not ask which of the two it has. It behaves as
TensorDict of the library tensordict does, of which only this much is needed.
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

Rows: TypeAlias = slice | Tensor | list[int] | None
Shape: TypeAlias = tuple[int, ...] | dict[str, tuple[int, ...]]


class NamedInputs(Mapping[str, Tensor]):
    """Examples of several inputs: tensors [n, ...] by name, and the model is called with them by these names.

    As of a tensor, the length is the number of examples, and an index takes rows; a name gives that one tensor.

    Raises:
        DataError: if there is none, a name is no name of an argument, or the tensors differ in their number of rows.

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
        """Makes one without checks: inside `vmap` its tensors have no dimension of examples."""
        made = object.__new__(cls)
        made._tensors = tensors
        return made

    @overload
    def __getitem__(self, at: str) -> Tensor: ...

    @overload
    def __getitem__(self, at: Rows) -> NamedInputs: ...

    def __getitem__(self, at: str | Rows) -> Tensor | NamedInputs:
        """Returns the tensor of a name, or the examples at some rows."""
        return self._tensors[at] if isinstance(at, str) else self.map(lambda t: t[at])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Returns the number of examples, not that of names."""
        return len(next(iter(self._tensors.values())))

    def __repr__(self) -> str:
        held = ", ".join(f"{name}: {list(t.shape)} {t.dtype}" for name, t in self._tensors.items())
        return f"NamedInputs({held})"

    def map(self, change: Callable[[Tensor], Tensor]) -> NamedInputs:
        """Returns what `change` makes of each tensor."""
        return self._of({name: change(t) for name, t in self._tensors.items()})

    def to(self, at: torch.device | str) -> NamedInputs:
        """Returns the same on another device."""
        return self.map(lambda t: t.to(at))

    def split(self, size: int) -> tuple[NamedInputs, ...]:
        """Returns parts of `size` examples, the last one with what is left."""
        return self._parts([t.split(size) for t in self._tensors.values()])

    def tensor_split(self, parts: int) -> tuple[NamedInputs, ...]:
        """Returns so many parts of nearly equal size."""
        return self._parts([t.tensor_split(parts) for t in self._tensors.values()])

    def _parts(self, columns: list[tuple[Tensor, ...]]) -> tuple[NamedInputs, ...]:
        rows = zip(*columns, strict=True)
        return tuple(self._of(dict(zip(self._tensors, row, strict=True))) for row in rows)

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; `to` keeps all on one."""
        return next(iter(self._tensors.values())).device


Inputs: TypeAlias = Tensor | NamedInputs
"""A batch of examples [n, ...] as a model takes it."""

Example: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""What a model may be called with: a tensor, several in the order of forward's arguments, or by their names."""


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
    if len({len(t) for t in tensors.values()}) > 1:
        counts = ", ".join(f"{len(t)} of '{name}'" for name, t in tensors.items())
        raise DataError(
            f"the inputs have different numbers of rows: {counts}",
            place=place,
            cure="give one row of each for every example",
        )


def as_inputs(x: Inputs | Mapping[str, Tensor]) -> Inputs:
    """Returns a dictionary of tensors as `NamedInputs`; all else as it is."""
    if isinstance(x, Mapping) and not isinstance(x, NamedInputs):
        return NamedInputs(x)
    return x


def arguments(x: Example) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Returns what a model is called with: by position and by name.

    >>> arguments({"ids": torch.tensor([1])})
    ((), {'ids': tensor([1])})
    """
    if isinstance(x, Mapping):
        return (), {name: x[name] for name in x}
    return ((x,) if isinstance(x, Tensor) else tuple(x)), {}


def call(model: Callable[..., Any], x: Example) -> Any:
    """Returns what `model` gives for a batch.

    Raises:
        ModelError: if it takes other names than those of the inputs.
    """
    if isinstance(x, Tensor):
        return model(x)
    args, named = arguments(x)
    try:
        return model(*args, **named)
    except TypeError as problem:
        if args:
            raise
        if said := _other_names(model, named):
            raise ModelError(
                said, place="model", cure="name the inputs as forward names its arguments"
            ) from problem
        raise


def positional(model: nn.Module, x: Example) -> tuple[Tensor, ...]:
    """Returns the inputs in the order of forward's arguments, for what can pass them by position alone.

    Raises:
        ModelError: if an argument before one of them is left out, or takes no position.

    >>> positional(nn.Linear(2, 1), NamedInputs({"input": torch.zeros(1, 2)}))
    (tensor([[0., 0.]]),)
    """
    if not isinstance(x, Mapping):
        return arguments(x)[0]
    ordered = [p.name for p in _parameters(model) if p.kind is not p.KEYWORD_ONLY][: len(list(x))]
    if set(ordered) != set(x):
        raise ModelError(
            f"forward begins with {_said(ordered)}, the examples have {_said(list(x))}",
            place=type(model).__name__,
            cure="put these arguments first in forward, for the graph is traced by position",
        )
    return tuple(x[name] for name in ordered)


def join(parts: Sequence[Inputs]) -> Inputs:
    """Returns batches of one form as one batch."""
    named = [parts_of(part) for part in parts]
    joined = {name: torch.cat([one[name] for one in named]) for name in named[0]}
    return NamedInputs._of(joined) if isinstance(parts[0], NamedInputs) else joined[""]


def parts_of(x: Inputs) -> dict[str, Tensor]:
    """Returns the tensors by name; one alone is called ""."""
    return {name: x[name] for name in x} if isinstance(x, NamedInputs) else {"": x}


def tensors_of(x: Example) -> list[Tensor]:
    """Returns the tensors in the order of the call."""
    args, named = arguments(x)
    return [*args, *named.values()]


def with_tensors(x: Example, tensors: Sequence[Tensor]) -> Example:
    """Returns inputs of the same form that hold `tensors`."""
    if isinstance(x, Tensor):
        return tensors[0]
    if isinstance(x, Mapping):
        named = dict(zip(x, tensors, strict=True))
        return NamedInputs._of(named) if isinstance(x, NamedInputs) else named
    return tuple(tensors)


@overload
def map_inputs(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor: ...


@overload
def map_inputs(x: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs: ...


@overload
def map_inputs(x: Example, change: Callable[[Tensor], Tensor]) -> Example: ...


def map_inputs(x: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """Returns what `change` makes of the tensor, or of each."""
    return with_tensors(x, [change(t) for t in tensors_of(x)])


def form_of(x: Inputs) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Returns the name, shape and type of each input of one example: equal where a network can take both.

    >>> form_of(torch.zeros(2, 3))
    (('', (3,), torch.float32),)
    """
    return tuple(sorted((name, tuple(t.shape[1:]), t.dtype) for name, t in parts_of(x).items()))


def shape_of(x: Inputs) -> Shape:
    """Returns the shape of one example: a tuple, or one for each name."""
    shapes = {name: tuple(t.shape[1:]) for name, t in parts_of(x).items()}
    return shapes if isinstance(x, NamedInputs) else shapes[""]


def dtype_of(x: Inputs) -> str | dict[str, str]:
    """Returns the type in which a network sees an example: "float32", also of bytes, "int64" or "bool"."""
    whole = {torch.int64: "int64", torch.bool: "bool"}
    dtypes = {name: whole.get(t.dtype, "float32") for name, t in parts_of(x).items()}
    return dtypes if isinstance(x, NamedInputs) else dtypes[""]


def shapes_in(shape: Shape) -> list[tuple[int, ...]]:
    """Returns the shapes of all inputs."""
    return list(shape.values()) if isinstance(shape, dict) else [shape]


def shape_text(shape: Shape) -> str:
    """Says a shape in words.

    >>> shape_text((3, 8, 8)), shape_text({"tokens": (12,), "lengths": ()})
    ('[3, 8, 8]', 'tokens [12], lengths []')
    """
    if isinstance(shape, dict):
        return ", ".join(f"{name} {list(sizes)}" for name, sizes in shape.items())
    return str(list(shape))


def is_image(x: Inputs) -> TypeGuard[Tensor]:
    """Says whether examples are images [n, C, H, W]; those among several inputs are nobody's but the model's."""
    return isinstance(x, Tensor) and x.dim() == 4


def inputs_text(x: Inputs) -> str:
    """Says shape and type of one example in words.

    >>> inputs_text(torch.zeros(2, 3))
    '[3] float32'
    """
    words = []
    for name, t in parts_of(x).items():
        kind = str(t.dtype).removeprefix("torch.")
        words.append(f"{name} {list(t.shape[1:])} {kind}".strip())
    return ", ".join(words)


def _parameters(model: Callable[..., Any]) -> list[inspect.Parameter]:
    forward = model.forward if isinstance(model, nn.Module) else model
    return list(inspect.signature(forward).parameters.values())


def _other_names(model: Callable[..., Any], x: Mapping[str, Tensor]) -> str:
    """Says in what the inputs differ from the arguments of a model; empty if they do not."""
    known = _parameters(model)
    gathers = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in known if p.default is p.empty and p.kind not in gathers]
    taken = {p.name for p in known if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in known)
    lacks = [name for name in needed if name not in x]
    extra = [name for name in x if name not in taken and not anything]
    if not lacks and not extra:
        return ""
    words = [f"needs {_said(lacks)} besides"] * bool(lacks)
    words += [f"does not take {_said(extra)}"] * bool(extra)
    return f"the model {' and '.join(words)}"


def _said(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _unflatten(tensors: Any, names: Any) -> NamedInputs:
    return NamedInputs._of(dict(zip(names, tensors, strict=True)))


register_pytree_node(
    NamedInputs,
    lambda x: ([x[name] for name in x], tuple(x)),
    _unflatten,
    serialized_type_name="fedpress.core.inputs.NamedInputs",
)
