"""The headline: the few numbers a reader looks for first, each the last known one beside that of the first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedpress.reports import units
from fedpress.reports.metrics import Shown, words_of
from fedpress.reports.protection import protects
from fedpress.reports.reading import Json

MUCH_FLOAT = 0.1  # of the parameters: more than this is said in the headline, not in a list alone


SAID_BESIDE = ("auc", "r2", "macro_f1", "micro_f1", "exact_match")
"""Metrics that have a place in the note of a tile: those without a unit."""


@dataclass(frozen=True)
class Tile:
    """One big number."""

    value: str
    name: str
    note: str = ""


def tiles(stages: list[Json]) -> list[Tile]:
    """Returns the tiles of a run; what no stage has measured is left out."""
    stages = [
        stage for stage in stages if stage.get("kind") != "measure"
    ] or stages  # it changes nothing
    found = [
        _score(stages),
        _beside(stages),
        _cost("parameters", stages, "parameters", units.count),
        _stays_float(stages),
        _cost("file size", stages, "file_bytes", _bytes),
        _latency(stages),
        _privacy([stage for stage in stages if stage.get("kind") == "federate"]),
        _traffic(stages),
    ]
    return [tile for tile in found if tile]


def _stays_float(stages: list[Json]) -> Tile | None:
    """Tells how much of a quantized network is no smaller than before, where that is more than a tenth."""
    found = [stage for stage in stages if units.number(stage.get("float_share")) is not None]
    said = stays_float(found[-1]) if found else None
    if said is None:
        return None
    share, names = said
    return Tile(share, "of the parameters stay float", names)


def stays_float(stage: Json) -> tuple[str, str] | None:
    """Returns the share of the parameters that a quantized network keeps in float and where most of them are.

    None if it is at most a tenth, or the stage says nothing of it.

    >>> stays_float({"float_share": 0.34, "mostly_float": ["embed"]})
    ('34%', 'most in embed')
    """
    share = units.number(stage.get("float_share"))
    if share is None or share <= MUCH_FLOAT:
        return None
    names = stage.get("mostly_float")
    where = ", ".join(str(name) for name in names) if isinstance(names, list) else ""
    return units.percent(share, 0), f"most in {where}" if where else ""


def _known(stages: list[Json], key: str) -> list[float]:
    return [x for x in (units.number(stage.get(key)) for stage in stages) if x is not None]


def _bytes(value: Any) -> str:
    return units.count(value, "B")


def _score(stages: list[Json]) -> Tile | None:
    shown = Shown.of(stages)
    found = _known(stages, shown.key)
    if not found:
        return None
    points = " points" if shown.metric.share else ""
    note = (
        f"{shown.change(found[-1], found[0])}{points} against the first stage"
        if len(found) > 1
        else ""
    )
    return Tile(shown.formatted(found[-1]), f"test {shown.name}", note)


def _beside(stages: list[Json]) -> Tile | None:
    """Gives the other metrics of the last stage that was measured: what a good first one may hide."""
    stage, words = _measured(stages), words_of(stages)
    shares = [w for w in words[1:] if w.share] or list(words[1:])
    first = next((w for w in shares if units.number(stage.get(w.key)) is not None), None)
    if first is None:
        return None
    others = (w for w in words[1:] if w not in (first, words[0]) and w.key in SAID_BESIDE)
    notes = [
        f"{w.name} {w.formatted(stage[w.key])}"
        for w in others
        if units.number(stage.get(w.key)) is not None
    ]
    if units.number(stage.get("majority_share")) is not None:
        notes.append(
            f"largest class: {units.percent(stage.get('majority_share'), 1)} of the test examples"
        )
    return Tile(first.formatted(stage[first.key]), first.name, "; ".join(notes))


def score_warning(stages: list[Json]) -> str:
    """Returns why the last measured stage is worth nothing though its metric may look good, or an empty text.

    Earlier stages do not count: a model that was just cut may guess until it is trained again.

    >>> guesser = {"accuracy": 0.5, "accuracy_warning": "it guesses"}
    >>> score_warning([{"accuracy": 0.9}, guesser]), score_warning([guesser, {"accuracy": 0.9}])
    ('it guesses', '')
    """
    stage = _measured(stages)
    found = (str(value) for key, value in stage.items() if key.endswith("_warning") and value)
    return next(found, "")


def _measured(stages: list[Json]) -> Json:
    """The last stage with a primary metric; an empty one if there is none."""
    shown = Shown.of(stages)
    return next((stage for stage in reversed(stages) if shown.value(stage) is not None), {})


def _cost(name: str, stages: list[Json], key: str, form: Callable[[Any], str]) -> Tile | None:
    numbers = _known(stages, key)
    if not numbers:
        return None
    first, last = numbers[0], numbers[-1]
    note = f"{units.percent(last / first, 1)} of {form(first)}" if first and last != first else ""
    return Tile(form(last), name, note)


def _latency(stages: list[Json]) -> Tile | None:
    """Gives the last latency, as a share of the first one in the same runtime: no other can be compared with it."""
    measured = [stage for stage in stages if units.number(stage.get("latency_ms")) is not None]
    if not measured:
        return None
    first, runtime = measured[0], measured[-1].get("runtime")
    tile = _cost(
        "latency",
        [s for s in measured if s.get("runtime") == runtime],
        "latency_ms",
        units.milliseconds,
    )
    assert tile is not None
    if first.get("runtime") == runtime:
        return tile
    share = f" ({tile.note})" if tile.note else ""
    before = f"{units.milliseconds(first.get('latency_ms'))} in {first.get('runtime') or 'an unknown runtime'}"
    return replace(
        tile, note=f"in {runtime or 'an unknown runtime'}{share}; the first stage: {before}"
    )


def _privacy(federated: list[Json]) -> Tile | None:
    if not federated:
        return None
    if not protects(federated):
        return Tile("none", "privacy spent, ε", "no differential privacy")
    last = federated[-1]
    note = f"at δ = {units.small(last.get('delta'))}, per {last.get('unit')}"
    note += f"; {last['epsilon_is']}" if last.get("epsilon_is") else ""
    return Tile(units.epsilon(last.get("epsilon")), "privacy spent, ε", note)


def _traffic(stages: list[Json]) -> Tile | None:
    up, down = _known(stages, "bytes_up"), _known(stages, "bytes_down")
    if not up + down:
        return None
    note = f"{_bytes(sum(up))} up, {_bytes(sum(down))} down"
    before = _known(stages, "set_up_bytes_up") + _known(stages, "set_up_bytes_down")
    if before:
        note += f"; {_bytes(sum(before))} before the first round"
    return Tile(_bytes(sum(up + down)), "bytes sent", note)
