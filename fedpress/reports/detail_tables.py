"""The smaller tables of a page: progress, metrics, privacy ledger, failures, runtimes."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.metrics import MetricFormat, metrics_of
from fedpress.reports.reading import Json, name_of, records_by_stage
from fedpress.reports.stage_table import noised_count
from fedpress.reports.table import Table

REASON_KEYS = ("told", "left", "whole_layers", "dense_weights", "float_layers", "left_float")
"""Keys of a stage's result with a table `{layer: reason}` of layers that the stage did not change.

Each kind of stage has its own key.
"""
NAMES_PER_ROW = 3  # a row shows three names and the number of the others: "a, b, c and 9 more"


def progress_table(records: list[Json]) -> Table:
    """Returns a row for each stage of an unfinished run: its last epoch or round, its metric."""
    rows, shown = [], MetricFormat.of(records)
    for steps in records_by_stage(records):
        last = steps[-1]
        # Pruning records the metric twice: after the cut, and after batch norms were recomputed.
        score = last.get(shown.key, last.get(f"{shown.key}_restored"))
        rows.append(
            [
                name_of(last),
                _far(last),
                shown.formatted(score),
                units.epsilon(last.get("epsilon")),
                units.seconds(_seconds(steps)),
            ]
        )
    return Table(header=["Stage", "Came to", f"Validation {shown.name}", "ε", "Time"], rows=rows)


def _far(last: Json) -> str:
    """Returns the last epoch or round of a stage, such as `round 5 of 20`."""
    word = "round" if "round" in last else "epoch"
    done, planned = last.get(word), last.get("num_rounds", last.get("epochs"))
    if done is None:
        return units.DASH
    return f"{word} {done}" if planned is None else f"{word} {done} of {planned}"


def _seconds(steps: list[Json]) -> object:
    """Returns the seconds that a stage has taken so far."""
    # The record of an epoch has the time since the stage began. The record of a round has the time
    # of this round.
    if "epoch" in steps[-1]:
        return steps[-1].get("seconds")
    known = units.numbers(steps, "seconds")
    return sum(known) if known else None


def metrics_table(stages: list[Json], *, most: int | None = None) -> Table:
    """Returns a row with the metrics on the test set for each stage.

    Stages that recorded only the first of several metrics are left out.

    Args:
        stages: the results of the stages.
        most: how many metrics to show, for a narrow terminal; None: all.
    """
    known = []
    for word in metrics_of(stages):
        if word.key != "loss" and _any_has(stages, word.key):
            known.append(MetricFormat(word))
    # The first metrics are the most important ones.
    known = known[:most]
    largest = _any_has(stages, "majority_share")
    rows = []
    for stage in stages:
        # Version 0.1 recorded the primary metric alone, which `stage_table` shows already.
        if all(shown.value(stage) is None for shown in known[1:]):
            continue
        cells = [shown.with_error(stage) for shown in known]
        # Beside the primary metric: an accuracy is worth something only above this share.
        if largest:
            cells.insert(1, units.percent(stage.get("majority_share")))
        rows.append([name_of(stage), *cells])
    titles = [shown.title for shown in known]
    if largest:
        titles.insert(1, "Largest class")
    return Table(header=["Stage", *titles], rows=rows)


def _any_has(stages: list[Json], key: str) -> bool:
    return any(units.number(stage.get(key)) is not None for stage in stages)


def metrics_explained(stages: list[Json]) -> str:
    """Returns a sentence for each column of `metrics_table` that needs an explanation."""
    said = ["On the test set."]
    if _any_has(stages, "majority_share"):
        said.append("Largest class: its share, the accuracy of always answering this class.")
    for metric in metrics_of(stages):
        if metric.meaning and _any_has(stages, metric.key):
            said.append(f"{MetricFormat(metric).title}: {metric.meaning}.")
    return " ".join(said)


def ledger_table(ledger: Json) -> Table | None:
    """Returns the charges of the privacy ledger; clients with equal charges share a row.

    A charge is the privacy cost of some rounds for one client. None: there are no charges.
    """
    found = ledger.get("charges")
    groups: dict[tuple[str, ...], list[str]] = {}
    for charge in found if isinstance(found, list) else ():
        if isinstance(charge, dict):
            groups.setdefault(_charged(charge), []).append(str(charge.get("who")))
    rows = []
    for (what, *numbers), names in groups.items():
        who = names[0] if len(names) == 1 else f"{len(names)} clients"
        rows.append([what, who, *numbers])
    header = ["For", "Whose data", "Sampling probability", "Noise multiplier", "Steps", "Rounds"]
    return Table(header=header, rows=rows) if rows else None


def _charged(charge: Json) -> tuple[str, ...]:
    """Returns the cells of a charge without the client's name."""
    rounds = units.DASH
    if charge.get("last_round"):
        rounds = f"{charge.get('first_round')} to {charge.get('last_round')}"
    keys = ("sampling_prob", "noise_multiplier", "steps")
    numbers = [units.compact(charge.get(key)) for key in keys]
    return (str(charge.get("what")), *numbers, rounds)


def unchanged_table(stages: list[Json]) -> Table:
    """Returns the layers that a stage did not change, with the reason.

    Layers with the same reason share a row: `["quantize", "fc, embed", "fewer than 64 weights"]`.
    """
    rows: list[list[str]] = []
    for stage in stages:
        by_reason: dict[str, list[str]] = {}
        for key in REASON_KEYS:
            found = stage.get(key)
            for name, reason in found.items() if isinstance(found, dict) else ():
                by_reason.setdefault(str(reason), []).append(name)
        for reason, names in by_reason.items():
            more = len(names) - NAMES_PER_ROW
            listed = ", ".join(names[:NAMES_PER_ROW])
            if more > 0:
                listed += f" and {more} more"
            rows.append([name_of(stage), listed, reason])
    return Table(header=["Stage", "Left unchanged", "Why"], rows=rows)


def failure_table(stages: list[Json], records: list[Json] | None = None) -> Table:
    """Returns a row for each client whose answers did not count.

    Under privacy, clients cannot be named. Then a row has the noised number of failures, if the
    number is clearly above its noise.

    Args:
        stages: the results of the stages.
        records: the run's records. They are used for a stage whose result does not list its
            failures, because the stage has not ended or an earlier version ran it.
    """
    rows: list[list[str]] = []
    listed = {name_of(stage) for stage in stages if isinstance(stage.get("failures"), dict)}
    for steps in records_by_stage(records or []):
        if name_of(steps[0]) not in listed:
            rows += _refused_rows(steps)
    for stage in stages:
        failures = stage.get("failures")
        if isinstance(failures, dict):
            rows += _failure_rows(name_of(stage), failures)
    return Table(header=["Stage", "Who", "Failed", "Why"], rows=rows)


def _failure_rows(stage: str, failures: Json) -> list[list[str]]:
    rows = []
    clients = failures.get("clients")
    for name, one in clients.items() if isinstance(clients, dict) else ():
        rows.append([stage, str(name), f"{one.get('rounds')} refused", str(one.get("reason"))])
    counted = failures.get("counted")
    # Under privacy the clients cannot be named. "sure": the count is clearly above its noise.
    if isinstance(counted, dict) and counted.get("sure"):
        who = "clients" if counted.get("unit") == "client" else "examples"
        diverged = counted.get("not_finite", 0) > counted.get("failed", 0)
        cause = "not finite" if diverged else "the model could not run on them"
        rows.append([stage, f"all {who}, counted with noise", noised_count(counted), cause])
    return rows


def _refused_rows(rounds: list[Json]) -> list[list[str]]:
    """Returns a row for each client whose answer was refused in some round of one stage."""
    found: dict[str, tuple[int, str]] = {}
    for one in rounds:
        refused = one.get("refused")
        for name, reason in refused.items() if isinstance(refused, dict) else ():
            # The last reason is kept, since it is the state that the client is in now.
            times, _ = found.get(name, (0, ""))
            found[name] = (times + 1, str(reason))
    stage = name_of(rounds[0])
    rows = []
    for name, (times, why) in found.items():
        rows.append([stage, name, f"{times} refused", why])
    return rows


def runtime_table(stages: list[Json]) -> Table:
    """Returns a row for each exported file and each measured runtime.

    The last column of a file is the share of examples on which it gives the same answer as the
    model.
    """
    rows = []
    for stage in stages:
        if stage.get("artifact"):
            rows.append(_file_row(stage))
        measured = stage.get("measure")
        found = measured.get("runtimes") if isinstance(measured, dict) else None
        for record in found if isinstance(found, list) else ():
            rows.append(_runtime_row(name_of(stage), record))
    return Table(header=["Stage", "File", "Runtime", "Size", "Latency", "Same answers"], rows=rows)


def _file_row(stage: Json) -> list[str]:
    parity = stage["parity"] if isinstance(stage.get("parity"), dict) else {}
    # Agreement with the float model matters to a user. Older results only have the agreement of
    # two runs of the exported graph.
    same = parity.get("same_argmax_as_model", parity.get("same_argmax_share"))
    return [
        name_of(stage),
        str(stage["artifact"]),
        str(stage.get("runtime") or ""),
        units.size(stage.get("file_bytes")),
        units.milliseconds(stage.get("latency_ms")),
        units.percent(same),
    ]


def _runtime_row(stage: str, record: Json) -> list[str]:
    # The first timing is for the smallest batch.
    first: Json = next(iter(record.get("timings", ())), {})
    return [
        stage,
        str(record.get("name")),
        str(record.get("runtime")),
        units.size(record.get("file_bytes")),
        units.milliseconds(first.get("median_ms")),
        units.DASH,
    ]
