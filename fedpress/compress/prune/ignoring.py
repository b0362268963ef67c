"""What a user wants left as it is: names of modules or weights, or patterns such as `block.3.*`."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from fedpress.errors import RecipeError, suggestion


def ignored(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Returns the names of all modules, parameters and buffers of `model` that `patterns` name.

    A module stands for all that lies in it; `*` in a pattern is any run of characters.

    Args:
        model: any module.
        patterns: such as "head" or "block.3.*".

    Raises:
        RecipeError: if a pattern matches nothing, or `patterns` is no list of texts.

    >>> sorted(ignored(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"]))
    ['0', '0.bias', '0.weight']
    """
    _check_texts(patterns)
    names = _names(model)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise RecipeError(
                f"no module or weight of the model matches '{pattern}'",
                place="ignore",
                cure=suggestion(pattern, names) or _examples(model),
            )
        inside = tuple(f"{hit}." for hit in hits)
        found |= hits | {name for name in names if name.startswith(inside)}
    return frozenset(found)


def _check_texts(patterns: Sequence[str]) -> None:
    """Refuses one text, which would be read letter by letter, and what is no text."""
    one = isinstance(patterns, str)
    if not one and all(isinstance(pattern, str) for pattern in patterns):
        return
    example = patterns if one else "head"
    raise RecipeError(
        f"got {patterns!r}, expected a list of names", place="ignore", cure=f'give ["{example}"]'
    )


def _names(model: nn.Module) -> list[str]:
    """Returns the names of all modules, parameters and buffers; of a shared one, each of its names."""
    named = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return [name for name, _ in named if name]


def _examples(model: nn.Module) -> str:
    """Returns the cure that tells some of the names that there are."""
    some = ", ".join([name for name, _ in model.named_children()][:5])
    return f"it has such as {some}" if some else "leave ignore out"
