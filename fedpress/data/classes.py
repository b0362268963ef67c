"""Which classes there are: a list in the recipe, the labels of public rows, or labels declared public by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpress.data.examples import TargetRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

OTHER = "other"


def label_is_public(settings: DataSettings) -> bool:
    """Says whether the user declared that the labels of private rows may be named."""
    return settings.label_column in settings.public_words


def rows_that_define_classes(
    public: Tensor, total: int, settings: DataSettings, what: str
) -> Tensor:
    """Returns the positions int64 [m] of the rows from which the list of classes may be taken.

    Args:
        public: the positions of the public rows.
        total: the number of all rows.
        settings: the data table of the recipe.
        what: names the labels in an error.

    Raises:
        DataError: if there are no public rows and nothing was declared.
    """
    if label_is_public(settings):
        return torch.arange(total)
    if not len(public):
        raise DataError(
            (
                "no row is public, and the labels of private rows must not decide which "
                "classes there are"
            ),
            place=what,
            cure=(
                'add classes = ["NAME", "NAME"] to [data], or public_words = '
                f'["{settings.label_column}"] if the names of the classes are no secret, or '
                "public_share = 0.1"
            ),
        )
    return public


def number_classes(
    codes: Tensor, words: Sequence[str], public: Tensor, settings: DataSettings, what: str
) -> TargetRows:
    """Keeps the classes that are in the recipe, or that rows have which may name them.

    Args:
        codes: int64 [n], for each row a position in `words`; -1 for a row whose label is none of them.
        words: the labels of all rows, in the order that classes are to have.
        public: positions of the public rows.
        settings: the data table of the recipe.
        what: names the labels in an error.

    Raises:
        DataError: if there are fewer than two classes, or nothing says which there are.
    """
    if settings.classes is not None:
        names = settings.classes
    else:
        rows = rows_that_define_classes(public, len(codes), settings, what)
        seen = set(codes[rows].tolist())
        names = tuple(word for position, word in enumerate(words) if position in seen)
    number = {name: position for position, name in enumerate(names)}
    table = torch.tensor(
        [*(number.get(word, -1) for word in words), -1]
    )  # the last one serves the code -1
    return checked(TargetRows.of_classes(table[codes], names), settings, what)


def checked(found: TargetRows, settings: DataSettings, what: str) -> TargetRows:
    """Adds the class "other" where it is asked for, and refuses what cannot be learned.

    Raises:
        DataError: if there are fewer than two classes, or no row is of one.
    """
    if len(found.names) < 2:
        raise DataError(
            f"the public rows are all of one class, '{found.names[0]}'",
            place=what,
            cure=(
                "declare rows of other classes public, or name all classes with classes = "
                '["NAME", "NAME"]'
            ),
        )
    if not bool((found.y >= 0).any()):
        named = ", ".join(found.names[:8])
        raise DataError(
            f"no row of the {what} is one of {named}",
            place="classes",
            cure="write them as they are in the data",
        )
    if settings.unknown != OTHER:
        return found
    names = found.names if OTHER in found.names else (*found.names, OTHER)
    return TargetRows.of_classes(torch.where(found.y < 0, names.index(OTHER), found.y), names)
