"""Determines the list of classes: from the recipe, public rows, or labels that are declared public.

A recipe is the TOML file that describes a run. The list decides the size of the model's last layer,
and is saved with the model. So a label that only private rows have must not become a class.
Otherwise everybody could see that such a row exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpress.data.examples import TargetRows
from fedpress.data.settings import DataSettings
from fedpress.errors import DataError

OTHER = "other"
"""Value of the setting `unknown`, and the name of the class that unknown labels then join."""


def label_is_public(settings: DataSettings) -> bool:
    """Returns whether the recipe declares the list of labels public (`public_words`)."""
    return settings.label_column in settings.public_words


def rows_that_define_classes(
    public: Tensor, total: int, settings: DataSettings, what: str
) -> Tensor:
    """Returns the positions int64 [m] of the rows whose labels may define the classes.

    Args:
        public: positions of the public rows.
        total: number of all rows.
        settings: the `[data]` table of the recipe.
        what: name of the labels in an error.

    Raises:
        DataError: if there is neither a public row nor a declaration that the labels are public.
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
    """Gives each row the number of its class.

    The classes are those that the recipe lists, or the labels of the rows that may define classes.

    Args:
        codes: int64 [n]: position of each row's label in `words`; -1 if the label is not there.
        words: the different labels of all rows, in the order in which classes are numbered.
        public: positions of the public rows.
        settings: the `[data]` table of the recipe.
        what: name of the labels in an error.

    Raises:
        DataError: if no row may define classes, there are fewer than two classes, or no row belongs
            to any of them.
    """
    # A list in the recipe is public, so no row needs to be looked at.
    if settings.classes is not None:
        names = settings.classes
    else:
        rows = rows_that_define_classes(public, len(codes), settings, what)
        seen = set(codes[rows].tolist())
        names = tuple(word for position, word in enumerate(words) if position in seen)
    class_of_name = {name: position for position, name in enumerate(names)}
    # The code -1 indexes the last entry, which is added for this purpose.
    class_of_code = torch.tensor([*(class_of_name.get(word, -1) for word in words), -1])
    found = TargetRows.of_classes(class_of_code[codes], names)
    return with_other_class(found, settings, what)


def with_other_class(found: TargetRows, settings: DataSettings, what: str) -> TargetRows:
    """Adds the class "other" if the recipe says `unknown = "other"`, and checks the classes.

    Raises:
        DataError: if there are fewer than two classes, or no row belongs to any of them.
    """
    if len(found.names) < 2:
        raise DataError(
            f"all public rows have the same class, '{found.names[0]}'",
            place=what,
            cure=(
                "declare rows of other classes public, or name all classes with classes = "
                '["NAME", "NAME"]'
            ),
        )
    # Every row would be dropped. Most likely the recipe spells the names differently.
    if not bool((found.y >= 0).any()):
        named = ", ".join(found.names[:8])
        raise DataError(
            f"no row of the {what} is one of {named}",
            place="classes",
            cure="write them as they are in the data",
        )
    if settings.unknown != OTHER:
        return found
    # The data itself may have a class "other". Unknown labels then join that class.
    names = found.names if OTHER in found.names else (*found.names, OTHER)
    return TargetRows.of_classes(torch.where(found.y < 0, names.index(OTHER), found.y), names)
