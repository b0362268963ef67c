"""The table of the end: a line per stage, the same for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from fedpress.reports import units
from fedpress.reports.metrics import Shown, words_of
from fedpress.reports.reading import Json, records_by_stage, stages_of


@dataclass(frozen=True)
class Table:
    """A header and rows of text, all of one length; the first column holds names, the others numbers."""

    header: list[str]
    rows: list[list[str]]


def stage_table(result: Json, *, before: Json | None = None) -> Table:
    """Returns a row per stage of a `result.json`, after one of the model `before`; an empty column is left out.

    Accuracy stands with its change in percentage points, and parameters with their share, against the first stage.
    """
    stages = [*([before] if before else []), *stages_of(result)]
    columns = [
        [title or Shown.of(stages).title, *(cell(stage, stages) for stage in stages)]
        for title, cell in COLUMNS
    ]
    kept = [column for column in columns if column[0] == "Stage" or set(column[1:]) - {units.DASH}]
    return Table(
        header=[column[0] for column in kept],
        rows=[list(row) for row in zip(*(c[1:] for c in kept), strict=True)],
    )


def runtimes_told(result: Json, *, before: Json | None = None) -> str:
    """Returns which stage's latency is of which runtime, if there are several; else nothing.

    >>> stage = {"name": "dense", "latency_ms": 2.0, "runtime": "torch"}
    >>> runtimes_told({"stages": [stage, {"name": "export", "latency_ms": 1.0, "runtime": "onnxruntime"}]})
    'Latencies compare within one runtime only: dense in torch; export in onnxruntime.'
    """
    names: dict[str, list[str]] = {}
    for stage in [*([before] if before else []), *stages_of(result)]:
        if units.number(stage.get("latency_ms")) is not None:
            names.setdefault(str(stage.get("runtime") or "an unknown runtime"), []).append(
                _name(stage)
            )
    if len(names) < 2:
        return ""
    groups = "; ".join(f"{', '.join(stages)} in {runtime}" for runtime, stages in names.items())
    return f"Latencies compare within one runtime only: {groups}."


def progress_table(records: list[Json]) -> Table:
    """Returns a row per stage that has left records: how far it came; for a run that has no result yet."""
    rows, shown = [], Shown.of(records)
    for steps in records_by_stage(records):
        last = steps[-1]
        done = last.get("round", last.get("epoch"))
        planned = last.get("num_rounds", last.get("epochs"))
        word = "round" if "round" in last else "epoch"
        far = (
            units.DASH
            if done is None
            else f"{word} {done}" + ("" if planned is None else f" of {planned}")
        )
        score = last.get(shown.key, last.get(f"{shown.key}_restored"))
        seconds = [
            x for x in (units.number(step.get("seconds")) for step in steps) if x is not None
        ]
        so_far = (
            last.get("seconds") if "epoch" in last else sum(seconds) if seconds else None
        )  # epochs count on
        rows.append(
            [
                _name(last),
                far,
                shown.formatted(score),
                units.epsilon(last.get("epsilon")),
                units.seconds(so_far),
            ]
        )
    return Table(header=["Stage", "Came to", f"Validation {shown.name}", "ε", "Time"], rows=rows)


def metrics_table(stages: list[Json], *, most: int | None = None) -> Table:
    """Returns a row for each stage with the metrics of its task on the test set, the largest class among them.

    Args:
        stages: the lines of the result.
        most: only so many metrics, the first ones; a terminal is narrow.
    """
    words = words_of(stages)
    known = [
        word
        for word in words
        if word.key != "loss" and any(units.number(s.get(word.key)) is not None for s in stages)
    ]
    known = known[:most]
    largest = any(units.number(stage.get("majority_share")) is not None for stage in stages)
    rows = []
    for stage in stages:
        if not any(units.number(stage.get(word.key)) is not None for word in known[1:]):
            continue  # an older line has the first alone, which stands in the other table
        cells = [Shown(word).formatted(stage.get(word.key)) for word in known]
        if largest:
            cells.insert(1, units.percent(stage.get("majority_share")))
        rows.append([_name(stage), *cells])
    titles = [Shown(word).title for word in known]
    if largest:
        titles.insert(1, "Largest class")
    return Table(header=["Stage", *titles], rows=rows)


def metrics_explained(stages: list[Json]) -> str:
    """Returns in words what the columns of `metrics_table` say."""
    said = ["On the test set."]
    if any(units.number(stage.get("majority_share")) is not None for stage in stages):
        said.append("Largest class: its share, which is the accuracy of always answering it.")
    for word in words_of(stages):
        if word.says and any(units.number(stage.get(word.key)) is not None for stage in stages):
            said.append(f"{Shown(word).title}: {word.says}.")
    return " ".join(said)


def ledger_table(ledger: Json) -> Table | None:
    """Returns what was charged to private data; clients with the same charge share a row."""
    found = ledger.get("charges")
    charges = [c for c in found if isinstance(c, dict)] if isinstance(found, list) else []
    groups: dict[tuple[str, ...], list[str]] = {}
    for charge in charges:
        rounds = (
            f"{charge.get('first_round')} to {charge.get('last_round')}"
            if charge.get("last_round")
            else units.DASH
        )
        numbers = [
            units.small(charge.get(key)) for key in ("sampling_prob", "noise_multiplier", "steps")
        ]
        groups.setdefault((str(charge.get("what")), *numbers, rounds), []).append(
            str(charge.get("who"))
        )
    rows = [
        [what, who[0] if len(who) == 1 else f"{len(who)} clients", *numbers]
        for (what, *numbers), who in groups.items()
    ]
    header = ["For", "Whose data", "Sampling probability", "Noise multiplier", "Steps", "Rounds"]
    return Table(header=header, rows=rows) if rows else None


def left_table(stages: list[Json]) -> Table:
    """Returns a row for everything that a stage left as it was, with the reason; many of one reason share a row."""
    rows: list[list[str]] = []
    for stage in stages:
        found = [
            (n, str(why))
            for key in LEFT
            if isinstance(stage.get(key), dict)
            for n, why in stage[key].items()
        ]
        for reason in dict.fromkeys(why for _, why in found):
            names = [name for name, why in found if why == reason]
            few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            rows.append([_name(stage), few, reason])
    return Table(header=["Stage", "Left as it was", "Why"], rows=rows)


def failure_table(stages: list[Json], records: list[Json] | None = None) -> Table:
    """Returns a row for each client whose answers did not count, and for each noised count of what failed.

    `records` stand in for a stage that has no result yet, or that an earlier version ran.
    """
    rows: list[list[str]] = []
    told = {_name(stage) for stage in stages if isinstance(stage.get("failures"), dict)}
    for steps in records_by_stage(records or []):
        if _name(steps[0]) not in told:
            rows += _refused_rows(steps)
    for stage in stages:
        failures = stage.get("failures")
        if not isinstance(failures, dict):
            continue
        clients = failures.get("clients")
        for name, one in (clients if isinstance(clients, dict) else {}).items():
            rows.append(
                [_name(stage), str(name), f"{one.get('rounds')} refused", str(one.get("reason"))]
            )
        counted = failures.get("counted")
        if isinstance(counted, dict) and counted.get("sure"):
            who = "clients" if counted.get("unit") == "client" else "examples"
            diverged = counted.get("not_finite", 0) > counted.get("failed", 0)
            cause = "not finite" if diverged else "the model could not run on them"
            rows.append([_name(stage), f"all {who}, counted with noise", _counted(counted), cause])
    return Table(header=["Stage", "Who", "Failed", "Why"], rows=rows)


def _refused_rows(rounds: list[Json]) -> list[list[str]]:
    """A row for each client that a round of one stage refused, with the last reason."""
    found: dict[str, tuple[int, str]] = {}
    for one in rounds:
        refused = one.get("refused")
        for name, reason in (refused if isinstance(refused, dict) else {}).items():
            found[name] = (found.get(name, (0, ""))[0] + 1, str(reason))
    return [
        [_name(rounds[0]), name, f"{times} refused", why] for name, (times, why) in found.items()
    ]


def runtime_table(stages: list[Json]) -> Table:
    """Returns a row for each exported file, and for each runtime of a measure stage: size, latency, parity."""
    rows = []
    for stage in stages:
        if stage.get("artifact"):
            parity = stage["parity"] if isinstance(stage.get("parity"), dict) else {}
            same = units.percent(
                parity.get("same_argmax_as_model", parity.get("same_argmax_share"))
            )
            runtime, latency = str(stage.get("runtime") or ""), stage.get("latency_ms")
            cells = [_bytes(stage.get("file_bytes")), units.milliseconds(latency), same]
            rows.append([_name(stage), str(stage["artifact"]), runtime, *cells])
        found = stage["measure"].get("runtimes") if isinstance(stage.get("measure"), dict) else None
        for record in found if isinstance(found, list) else ():
            first: Json = next(iter(record.get("timings", ())), {})
            cells = [
                _bytes(record.get("file_bytes")),
                units.milliseconds(first.get("median_ms")),
                units.DASH,
            ]
            rows.append([_name(stage), str(record.get("name")), str(record.get("runtime")), *cells])
    return Table(header=["Stage", "File", "Runtime", "Size", "Latency", "Same answers"], rows=rows)


def comparison_table(before: Json, after: Json) -> Table:
    """Returns a row for each number of one stage: before, after, and the change or share."""
    rows, shown = [], Shown.of([after, before])
    words = [word for word in words_of([after, before]) if word.key != "loss"]
    metrics = [(Shown(word).title, word.key, Shown(word).formatted) for word in words]
    for title, key, form in (*metrics, *COMPARED):
        old, new = units.number(before.get(key)), units.number(after.get(key))
        if key == "nonzero_parameters" and old is None and new is not None:
            old = units.number(before.get("parameters"))  # a network without zeros by design
        if old is None and new is None:
            continue
        # Only latencies of one runtime compare.
        other = key == "latency_ms" and before.get("runtime") != after.get("runtime")
        runtime = f" ({before.get('runtime')} → {after.get('runtime')})" if other else ""
        change = "" if other else _change(shown, key, old, new)
        rows.append([title + runtime, form(old), form(new), change])
    return Table(header=["", "Before", "After", ""], rows=rows)


def _change(shown: Shown, key: str, old: float | None, new: float | None) -> str:
    """Returns the change of the metric that is shown first, or what is left of a cost; empty for the rest."""
    if old is None or new is None:
        return ""
    if key == shown.key:
        points = " points" if shown.metric.share else ""
        return f"{shown.change(new, old)}{points}"
    return units.percent(new / old, 1) if key in COSTS and old else ""


def as_rich(table: Table, *, words: Collection[str] = ()) -> RichTable:
    """Returns a table for a terminal; the columns `words` and the first hold text that may wrap."""
    shown = RichTable(box=None, header_style="bold", pad_edge=False)
    for at, title in enumerate(table.header):
        text = at == 0 or title in words
        shown.add_column(
            title, justify="left" if text else "right", no_wrap=not text, overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def rich_table(result: Json) -> RichTable:
    """Returns `stage_table` for a terminal."""
    table = stage_table(result)
    shown = RichTable(
        box=None, header_style="bold", pad_edge=False, collapse_padding=True
    )  # fits 80 columns
    for at, title in enumerate(table.header):
        wraps = at < 2 or title == "Params"  # a number and its bracket may stand in two lines
        shown.add_column(title, justify="left" if title == "Stage" else "right", no_wrap=not wraps)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))  # Text: a name with [brackets] is no markup
    return shown


def _name(stage: Json) -> str:
    return str(stage.get("name") or stage.get("kind") or "?")


def _first(stages: list[Json], key: str) -> float | None:
    """The value of the first stage that has one."""
    return next(
        (x for x in (units.number(stage.get(key)) for stage in stages) if x is not None), None
    )


def _score(stage: Json, stages: list[Json]) -> str:
    shown = Shown.of(stages)
    change = shown.change(stage.get(shown.key), _first(stages, shown.key))
    return shown.formatted(stage.get(shown.key)) + (
        f" ({change})" if change and stage is not stages[0] else ""
    )


def _parameters(stage: Json, stages: list[Json]) -> str:
    own, first = units.number(stage.get("parameters")), _first(stages, "parameters")
    share = f" ({units.percent(own / first, 1)})" if own and first and own != first else ""
    return units.count(own) + share


def _epsilon(stage: Json, stages: list[Json]) -> str:
    private = units.epsilon(stage.get("epsilon"))
    return "none" if private == units.DASH and stage.get("kind") == "federate" else private


def _failed(stage: Json, stages: list[Json]) -> str:
    """How many answers of clients did not count, or about how many protected units gave nothing."""
    failures = stage.get("failures")
    if not isinstance(failures, dict):
        return units.DASH
    if failures.get("refused"):
        return f"{failures['refused']} of {failures.get('asked')}"
    counted = failures.get("counted")
    return _counted(counted) if isinstance(counted, dict) and counted.get("sure") else units.DASH


def _counted(counted: Json) -> str:
    of = counted.get("of", 0.0)
    count = min(max(counted.get("not_finite", 0.0) + counted.get("failed", 0.0), 0.0), of)
    return f"≈{count:,.0f} of {of:,.0f}"


def _plain(key: str, form: Callable[[Any], str]) -> Callable[[Json, list[Json]], str]:
    return lambda stage, stages: form(stage.get(key))


def _bytes(value: Any) -> str:
    return units.count(value, "B")


LEFT = ("told", "left", "whole_layers", "dense_weights", "float_layers", "left_float")
COMPARED: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Parameters", "parameters", units.count),
    ("Non-zeros", "nonzero_parameters", units.count),
    ("MACs", "macs", units.count),
    ("File", "file_bytes", _bytes),
    ("Packed", "packed_file_bytes", _bytes),
    ("Latency", "latency_ms", units.milliseconds),
)
COSTS = tuple(key for _, key, _ in COMPARED)
COLUMNS: tuple[tuple[str, Callable[[Json, list[Json]], str]], ...] = (
    ("Stage", lambda stage, stages: _name(stage)),
    ("", _score),  # its title is that of the task's metric
    ("Params", _parameters),
    ("Non-zeros", _plain("nonzero_parameters", units.count)),
    ("MACs", _plain("macs", units.count)),
    ("Size", _plain("file_bytes", _bytes)),
    ("Packed", _plain("packed_file_bytes", _bytes)),
    ("Latency", _plain("latency_ms", units.milliseconds)),
    ("Up", _plain("bytes_up", _bytes)),
    ("Down", _plain("bytes_down", _bytes)),
    ("ε", _epsilon),
    ("Failed", _failed),
    ("Time", _plain("seconds", units.seconds)),
)
