"""Makes the tiles of a page: the most important numbers of a run, compared with the first stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedpress.reports import units
from fedpress.reports.comparable import (
    changing_stages,
    examples_of,
    exported_format,
    runtime_of,
    same_test_set,
)
from fedpress.reports.metrics import MetricFormat, metrics_of
from fedpress.reports.protection import all_private, asks_clients
from fedpress.reports.reading import Json

MUCH_FLOAT = 0.1  # up to this share, float parameters hardly change the size and are not shown

NOTED_METRICS = ("auc", "r2", "macro_f1", "micro_f1", "exact_match")
"""Metrics that are shown in the note of another metric's tile: they are numbers without a unit."""


@dataclass(frozen=True)
class Tile:
    """One important number, shown large at the top of the page.

    Attributes:
        value: the number with its unit, such as "93.31%".
        name: name of the number, such as "test accuracy".
        note: small print below the number, such as a comparison with the first stage.
    """

    value: str
    name: str
    note: str = ""


def tiles(stages: list[Json]) -> list[Tile]:
    """Returns the tiles of a run; a number that was not measured has no tile."""
    # A stage of kind "measure" only repeats the numbers of the stage before.
    stages = changing_stages(stages)
    found = [
        _score(stages),
        _second_metric(stages),
        _cost("parameters", stages, "parameters", units.count),
        _float_tile(stages),
        _file(stages),
        _latency(stages),
        _privacy(asks_clients(stages)),
        _traffic(stages),
    ]
    return [tile for tile in found if tile]


def _float_tile(stages: list[Json]) -> Tile | None:
    """Returns the share of a quantized network that stays float; None if it is at most a tenth."""
    found = units.lines_with(stages, "float_share")
    share_and_names = stays_float(found[-1]) if found else None
    if share_and_names is None:
        return None
    share, names = share_and_names
    return Tile(share, "of the parameters stay float", names)


def stays_float(stage: Json) -> tuple[str, str] | None:
    """Returns the share of the parameters that stay float, and the layers with most of them.

    Returns None if the share is at most a tenth or not recorded.

    >>> stays_float({"float_share": 0.34, "mostly_float": ["embed"]})
    ('34%', 'most in embed')
    """
    share = units.number(stage.get("float_share"))
    if share is None or share <= MUCH_FLOAT:
        return None
    names = stage.get("mostly_float")
    where = ", ".join(str(name) for name in names) if isinstance(names, list) else ""
    return units.percent(share, 0), f"most in {where}" if where else ""


def _score(stages: list[Json]) -> Tile | None:
    """Returns the main metric with its standard error.

    The note has the change against the first stage, if the test set is the same.
    """
    shown = MetricFormat.of(stages)
    measured = units.lines_with(stages, shown.key)
    if not measured:
        return None
    first, last = measured[0], measured[-1]

    spread = error_and_count(shown, last)
    notes = [spread] if spread else []
    # A change between two test sets says nothing about the models.
    if len(measured) > 1 and same_test_set(first, last):
        points = " points" if shown.metric.share else ""
        change = shown.change(last[shown.key], first[shown.key])
        notes.append(f"{change}{points} against the first stage")
    elif len(measured) > 1:
        notes.append("the first stage was measured on other test examples")
    return Tile(shown.formatted(last[shown.key]), f"test {shown.name}", "; ".join(notes))


def error_and_count(shown: MetricFormat, stage: Json) -> str:
    """Returns the standard error of a stage's metric, and the number of test examples.

    >>> accuracy = MetricFormat.of([{"task": "classification"}])
    >>> error_and_count(accuracy, {"accuracy": 0.9, "accuracy_error": 0.0108, "test_examples": 539})
    '± 1.08 (n = 539)'
    >>> error_and_count(accuracy, {"accuracy": 0.9, "test_examples": 539})
    'n = 539'
    """
    error, n = shown.error(stage), examples_of(stage)
    if n is None:
        return error
    return f"{error} (n = {n:,})" if error else f"n = {n:,}"


def _second_metric(stages: list[Json]) -> Tile | None:
    """Returns the second metric of the task; the note has further metrics.

    A good accuracy may come with a bad balanced accuracy, so a reader needs both. The note also has
    the share of the largest class, if there are classes.
    """
    stage = _measured(stages)
    others = metrics_of(stages)[1:]
    known = [metric for metric in others if units.number(stage.get(metric.key)) is not None]
    # A share in percent is read more easily than a number between 0 and 1.
    shares = [metric for metric in known if metric.share]
    if not known:
        return None
    if shares:
        first = shares[0]
    # The task has a second metric in percent, but this run did not measure it.
    elif any(metric.share for metric in others):
        return None
    else:
        first = known[0]

    notes = []
    for metric in known:
        if metric is not first and metric.key in NOTED_METRICS:
            notes.append(f"{metric.name} {metric.formatted(stage[metric.key])}")
    if units.number(stage.get("majority_share")) is not None:
        share = units.percent(stage.get("majority_share"), 1)
        notes.append(f"largest class: {share} of the test examples")
    return Tile(first.formatted(stage[first.key]), first.name, "; ".join(notes))


def score_warning(stages: list[Json]) -> str:
    """Returns the warning of the last measured stage, such as a model that only guesses; else "".

    Warnings of earlier stages do not count: a model that was just pruned may guess until it is
    trained again.

    >>> guesser = {"accuracy": 0.5, "accuracy_warning": "it guesses"}
    >>> score_warning([{"accuracy": 0.9}, guesser]), score_warning([guesser, {"accuracy": 0.9}])
    ('it guesses', '')
    >>> score_warning([{"auc": None, "task": "binary", "accuracy_warning": "all are ill"}])
    'all are ill'
    """
    for key, value in _measured(stages).items():
        if key.endswith("_warning") and value:
            return str(value)
    return ""


def _measured(stages: list[Json]) -> Json:
    """Returns the last stage that measured the network; {} if there is none.

    Its main metric may be undefined (None), such as the AUC on a test set of one class. The other
    metrics and the warning are needed then most of all.
    """
    key = MetricFormat.of(stages).key
    measured = [stage for stage in stages if key in stage]
    return measured[-1] if measured else {}


def _cost(name: str, stages: list[Json], key: str, form: Callable[[Any], str]) -> Tile | None:
    """Returns the last value of a cost; the note compares it with the first: "30.0% of 1.00 M"."""
    numbers = units.numbers(stages, key)
    if not numbers:
        return None
    first, last = numbers[0], numbers[-1]
    note = f"{units.percent(last / first, 1)} of {form(first)}" if first and last != first else ""
    return Tile(form(last), name, note)


def _file(stages: list[Json]) -> Tile | None:
    """Returns the last file size, with its share of the first file size.

    An exported file also contains the network's operations, so its size is not compared with that
    of another kind of file. If the last file is of another kind than the first, the note has the
    last size of the first kind.
    """
    sized = units.lines_with(stages, "file_bytes")
    if not sized:
        return None
    first, last = exported_format(sized[0]), exported_format(sized[-1])
    # A file of weights is compared with files of weights only.
    alike = [stage for stage in sized if exported_format(stage) == first]
    tile = _cost("file size", alike, "file_bytes", units.size)
    if tile is None or first == last:
        return tile
    share = f", {tile.note}" if tile.note else ""
    last_kind, first_kind = last or "the numbers alone", first or "the numbers alone"
    note = f"{last_kind}; {first_kind}: {tile.value}{share}"
    return Tile(units.size(sized[-1]["file_bytes"]), tile.name, note)


def _latency(stages: list[Json]) -> Tile | None:
    """Returns the last latency, with its share of the first latency in the same runtime.

    If the runtime has changed, the note also has the latency in the first runtime.
    """
    measured = units.lines_with(stages, "latency_ms")
    if not measured:
        return None
    first, last = runtime_of(measured[0]), runtime_of(measured[-1])
    # A share of a latency in another runtime would compare runtimes, not models.
    tile = _latency_in(last, measured)
    if tile is None or first == last:
        return tile
    before = _latency_in(first, measured)
    notes = [", ".join(filter(None, [f"in {last}", tile.note]))]
    if before is not None:
        notes.append(", ".join(filter(None, [f"in {first} {before.value}", before.note])))
    return Tile(tile.value, tile.name, "; ".join(notes))


def _latency_in(runtime: str, measured: list[Json]) -> Tile | None:
    alike = [stage for stage in measured if runtime_of(stage) == runtime]
    return _cost("latency", alike, "latency_ms", units.milliseconds)


def _privacy(asking: list[Json]) -> Tile | None:
    if not asking:
        return None
    # If one stage has no privacy, the epsilon of the other stages says nothing about the network.
    if not all_private(asking):
        return Tile("none", "privacy spent, ε", "no differential privacy")
    last = asking[-1]
    note = f"at δ = {units.compact(last.get('delta'))}, per {last.get('unit')}"
    note += f"; {last['epsilon_is']}" if last.get("epsilon_is") else ""
    return Tile(units.epsilon(last.get("epsilon")), "privacy spent, ε", note)


def _traffic(stages: list[Json]) -> Tile | None:
    up, down = units.numbers(stages, "bytes_up"), units.numbers(stages, "bytes_down")
    if not up + down:
        return None
    note = f"{units.size(sum(up))} up, {units.size(sum(down))} down"
    # Shown apart: it is sent once, however many rounds follow.
    before = units.numbers(stages, "set_up_bytes_up") + units.numbers(stages, "set_up_bytes_down")
    if before:
        note += f"; {units.size(sum(before))} before the first round"
    return Tile(units.size(sum(up + down)), "bytes sent", note)
