"""Finds the modules and weights that the setting `ignore` names, by patterns (`block.3.*`)."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from fedpress.errors import RecipeError, suggestion


def ignored_names(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Returns the names of all modules, parameters and buffers of `model` that match `patterns`.

    If a module matches, all names inside it are returned too. `*` in a pattern matches any
    characters, also dots.

    Args:
        model: any module.
        patterns: such as "head" or "block.3.*".

    Raises:
        RecipeError: if a pattern matches nothing, or `patterns` is not a list of strings.

    >>> sorted(ignored_names(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["0"]))
    ['0', '0.bias', '0.weight']
    """
    _check_strings(patterns)
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
        # The dot keeps "block.1" from matching "block.10".
        inside = tuple(f"{hit}." for hit in hits)
        found |= hits | {name for name in names if name.startswith(inside)}
    return frozenset(found)


def _check_strings(patterns: Sequence[str]) -> None:
    """Raises an error unless `patterns` is a list of strings.

    A single string would otherwise be read letter by letter.
    """
    is_single = isinstance(patterns, str)
    if not is_single and all(isinstance(pattern, str) for pattern in patterns):
        return
    example = patterns if is_single else "head"
    raise RecipeError(
        f"got {patterns!r}, expected a list of names", place="ignore", cure=f'give ["{example}"]'
    )


def _names(model: nn.Module) -> list[str]:
    """Returns the names of all modules, parameters and buffers; every name of a shared one."""
    named = [
        *model.named_modules(remove_duplicate=False),
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    # The model itself is left out, because its name is empty.
    return [name for name, _ in named if name]


def _examples(model: nn.Module) -> str:
    """Returns a cure with some of the names that exist."""
    some = ", ".join([name for name, _ in model.named_children()][:5])
    return f"names look like {some}" if some else "leave ignore out"
