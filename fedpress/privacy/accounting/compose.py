"""A JSON file of mechanisms, or a run's ledger, to the epsilon of all of it."""

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


def epsilon(text: str, *, delta: float, place: str = "phases") -> float:
    """Returns the epsilon that the mechanisms in `text` spend together at `delta`; see `spent`.

    >>> round(epsilon('[{"sampling_prob": 1, "noise_multiplier": 5, "steps": 50}]', delta=1e-3), 2)
    4.85
    """
    return spent(text, delta=delta, place=place).epsilon


def spent(text: str, *, delta: float, place: str = "phases") -> accountant.Spent:
    """Returns what the mechanisms in `text` spend together at `delta`.

    Args:
        text: a JSON list of phases, each with the fields of `GaussianEvent`, or with `"kind": "skellam"` those of
            `SkellamEvent`; or the text of a ledger, whose most exposed party counts.
        delta: chance with which the promise may fail.
        place: what errors call the text, for instance its file.

    Raises:
        RecipeError: if the text is no such list, naming the place and the cure.
        PrivacyError: if it is a damaged ledger.
    """
    try:
        page = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(
            f"not JSON ({error})", place=place, cure="give a list of phases or a ledger.json"
        ) from error
    if isinstance(page, dict) and "charges" in page:
        accountant.check_delta(delta)
        return Ledger.from_json(text).spent(delta=delta)
    if not isinstance(page, list):
        raise RecipeError(
            f"got {type(page).__name__}, expected a list of phases or a ledger.json", place=place
        )
    return accountant.spent(
        [_phase(entry, f"{place}[{i}]") for i, entry in enumerate(page)], delta=delta
    )


def _phase(entry: Any, place: str) -> MechanismEvent:
    if not isinstance(entry, dict):
        raise RecipeError(
            f"got {entry!r}, expected an object with {', '.join(_names(GaussianEvent))}",
            place=place,
        )
    given = dict(entry)
    word = given.pop("kind", "gaussian")
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise RecipeError(
            f"got {word!r}, expected one of {', '.join(KINDS)}", place=f"{place}.kind"
        )
    for name, value in given.items():
        if name not in _names(kind):
            raise RecipeError(
                "no such key",
                place=f"{place}.{name}",
                cure=suggestion(
                    name, _names(kind), f"a {word} phase has {', '.join(_names(kind))}"
                ),
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"got {value!r}, expected a number", place=f"{place}.{name}")
    for field in fields(kind):
        if field.default is MISSING and field.name not in given:
            raise RecipeError("is missing", place=f"{place}.{field.name}", cure="give it a number")
    with inside(place):
        return kind(**given)


def _names(kind: type[GaussianEvent] | type[SkellamEvent]) -> list[str]:
    return [field.name for field in fields(kind)]
