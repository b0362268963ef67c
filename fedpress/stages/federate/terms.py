"""What a stage asks of the owner of a client's data: the terms, which the owner may approve early.

The terms follow from a recipe alone. So they contain nothing that depends on the server's data,
such as the names of classes, or the sizes of a built-in network that a recipe may leave out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpress.core.canonical import JSON
from fedpress.core.random import fingerprint as digest_of
from fedpress.data.preparation import InputColumn, Preparation
from fedpress.data.preparation_parts import TextPart
from fedpress.errors import DataError
from fedpress.models import ARCHITECTURES, DATA_SIZES
from fedpress.models.spec import COLUMN_SUMS
from fedpress.stages.federate.settings import FederateSettings
from fedpress.tasks import ColumnSums

COUNTED = ("words", "truth")
"""Kinds of columns whose words are counted."""


@dataclass(frozen=True)
class Terms:
    """What a stage asks for.

    Attributes:
        settings: the settings of the federate stage; for a query those of its one round.
        architecture: name of the model's architecture, such as "cnn".
        arguments: arguments of the architecture, such as `{"width": 8}`. Of a query: its columns,
            see `query_arguments`.
        labels: columns that the model predicts.
    """

    settings: FederateSettings
    architecture: str
    arguments: Mapping[str, JSON]
    labels: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the terms as plain JSON values."""
        # The stage class itself has the same fields. Simulated delays are left out: clients over a
        # network take real time.
        settings = FederateSettings.model_validate({**self.settings.model_dump(), "delays": None})
        follows = DATA_SIZES if self.architecture in ARCHITECTURES else ()
        own = {name: value for name, value in self.arguments.items() if name not in follows}
        return {
            "settings": settings.model_dump(mode="json", exclude_defaults=True),
            "model": {"architecture": self.architecture, "arguments": own},
            "labels": list(self.labels),
        }

    @property
    def fingerprint(self) -> str:
        """Digest of the terms, 16 hexadecimal digits."""
        return digest_of(json.dumps(self.to_json(), sort_keys=True))[:16]


def query_arguments(
    bounds: Mapping[str, Sequence[float]],
    bins: int,
    words: Sequence[str],
    gaps: bool,
    *,
    tokens: bool = False,
) -> dict[str, JSON]:
    """Returns what a query asks for, by the names of the columns.

    Args:
        bounds: lower and upper bound of each column of numbers.
        bins: number of bins between the bounds; 0: the sums of values and squares.
        words: columns whose words are counted.
        gaps: whether the cells with a value are counted in each column. Then the words of all
            columns are counted, and `words` is not used.
        tokens: whether the tokens of texts are counted, which have no columns.
    """
    counted: JSON = "all" if gaps else [*sorted(words)]
    asked: dict[str, JSON] = {name: [float(one) for one in both] for name, both in bounds.items()}
    return {"bounds": asked, "bins": bins, "words": counted, "gaps": gaps, "tokens": tokens}


def terms_of_offer(
    settings: FederateSettings,
    architecture: str,
    arguments: Mapping[str, JSON],
    labels: Sequence[str],
    *,
    task: str,
    inputs: Mapping[str, Any] | None,
) -> Terms:
    """Returns the terms of a server's offer.

    Args:
        settings: settings of the stage.
        architecture: name of the model's architecture.
        arguments: its arguments.
        labels: columns that the model predicts.
        task: kind of the task.
        inputs: how columns become inputs, which a query needs (`Preparation.to_json`); or None.
    """
    named = None
    if (architecture, task) == (COLUMN_SUMS, ColumnSums.kind) and inputs is not None:
        named = _named(arguments, inputs)
    if named is None:
        return Terms(settings, architecture, arguments, labels)
    return Terms(without_clip_norm(settings), architecture, named, labels)


def without_clip_norm(settings: FederateSettings) -> FederateSettings:
    """Returns the settings of a query's round with the default clip norm.

    The clip norm of a query follows from its number of columns, which only the data know. The
    promise does not hang on it: the noise is a multiple of it.
    """
    private = settings.privacy
    if private is None:
        return settings
    default = type(private).model_fields["clip_norm"].default
    same = private.model_copy(update={"clip_norm": default})
    return settings.model_copy(update={"privacy": same})


def _named(arguments: Mapping[str, JSON], inputs: Mapping[str, Any]) -> dict[str, JSON] | None:
    """Returns what an offered query asks for, by the names of the columns.

    None: it asks for something that no recipe asks for, such as the squares of words. Then nobody
    can have approved it.
    """
    try:
        return _Asked.of(inputs).named(arguments)
    # The offer may come from a malicious server.
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True)
class _Asked:
    """What a query can be about.

    Attributes:
        at: the columns of a table by the position of their first input.
        texts: whether the data are texts, which have no columns.
    """

    at: Mapping[int, InputColumn]
    texts: bool

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> _Asked:
        found, at = {}, 0
        about = Preparation.from_json(inputs)
        for column in about.columns:
            found[at] = column
            at += column.width
        return cls(found, about.kind == TextPart.key)

    def named(self, arguments: Mapping[str, Any]) -> dict[str, JSON]:
        """See `_named`; raises ValueError or KeyError for what no recipe asks for."""
        bounds: dict[str, tuple[float, float]] = {}
        sizes = set()
        for at, low, high, bins in arguments["numbers"]:
            column = self.at[at]
            _require(column.kind == "number" and column.name not in bounds)
            bounds[column.name] = (low, high)
            sizes.add(bins)
        words = []
        for at, width in arguments["flags"]:
            column = self.at[at]
            _require(column.kind in COUNTED and column.width == width)
            words.append(column.name)
        _require(len(sizes) <= 1 and len(set(words)) == len(words))
        tokens = arguments.get("tokens", 0) > 0
        _require(tokens == self.texts)
        gaps = arguments["gaps"] is True
        return query_arguments(bounds, max(sizes, default=0), words, gaps, tokens=tokens)


def _require(true: bool) -> None:
    if not true:
        raise ValueError("no recipe asks for this")
