"""Computes the epsilon of mechanism events that are given as JSON, or of a run's ledger.

A mechanism event is a number of noised sums. The ledger of a run (`ledger.json`) lists the events
that ran on each client's data.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

from fedpress.errors import RecipeError, inside, suggestion
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.events import GaussianEvent, MechanismEvent, SkellamEvent
from fedpress.privacy.ledger import Ledger

KINDS: dict[str, type[GaussianEvent] | type[SkellamEvent]] = {
    "gaussian": GaussianEvent,
    "skellam": SkellamEvent,
}
"""Value of the key `kind` in JSON -> class of the event."""


def epsilon(text: str, *, delta: float, place: str = "events") -> float:
    """Returns the epsilon of all mechanisms in `text` together at `delta`; see `spent`.

    >>> text = '[{"sampling_prob": 1, "noise_multiplier": 5, "steps": 50}]'
    >>> round(epsilon(text, delta=1e-3), 2)
    4.85
    """
    return spent(text, delta=delta, place=place).epsilon


def spent(text: str, *, delta: float, place: str = "events") -> accountant.Spent:
    """Returns the epsilon of all mechanisms in `text` together, and whether it is an upper bound.

    Args:
        text: a JSON list of events with the fields of `GaussianEvent`, or of `SkellamEvent` with
            `"kind": "skellam"`. Or the text of a ledger: then the result is the largest epsilon of
            any client.
        delta: probability with which the guarantee may fail.
        place: name of the text in errors, such as its file.

    Raises:
        RecipeError: if the text is not a list of events, or `delta` is out of range.
        PrivacyError: if the text is a damaged ledger.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"not JSON ({error})", place=place, cure="give a list of events or a ledger.json"
        ) from error
    # Only a ledger is a JSON object with this key.
    if isinstance(content, dict) and "charges" in content:
        accountant.check_delta(delta)
        return Ledger.from_json(text).spent(delta=delta)
    if not isinstance(content, list):
        raise RecipeError(
            f"got {type(content).__name__}, expected a list of events or a ledger.json",
            place=place,
        )
    events = [_read_event(entry, f"{place}[{i}]") for i, entry in enumerate(content)]
    return accountant.spent(events, delta=delta)


def _read_event(entry: Any, place: str) -> MechanismEvent:
    if not isinstance(entry, dict):
        raise RecipeError(
            f"got {entry!r}, expected an object with {', '.join(_field_names(GaussianEvent))}",
            place=place,
        )
    given = dict(entry)
    word = given.pop("kind", "gaussian")
    # A list or an object as `kind` is not hashable, so it cannot be looked up.
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise RecipeError(
            f"got {word!r}, expected one of {', '.join(KINDS)}", place=f"{place}.kind"
        )
    # A misspelled key must not fall back to a default: epsilon would be too small.
    names = _field_names(kind)
    for name, value in given.items():
        if name not in names:
            raise RecipeError(
                "no such key",
                place=f"{place}.{name}",
                cure=suggestion(name, names, f"a {word} event has {', '.join(names)}"),
            )
        # JSON's `true` is a bool, which Python would count as the number 1.
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"got {value!r}, expected a number", place=f"{place}.{name}")
    for field in fields(kind):
        if field.default is MISSING and field.name not in given:
            raise RecipeError("is missing", place=f"{place}.{field.name}", cure="give it a number")
    with inside(place):
        return kind(**given)


def _field_names(kind: type[GaussianEvent] | type[SkellamEvent]) -> list[str]:
    return [field.name for field in fields(kind)]
