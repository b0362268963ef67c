"""Writes the result of a run in one sentence, for the top of its report and for the terminal."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.comparable import (
    changing_stages,
    examples_of,
    exported_format,
    runtime_of,
    same_test_set,
)
from fedpress.reports.headline import error_and_count, score_warning
from fedpress.reports.metrics import MetricFormat
from fedpress.reports.protection import all_private
from fedpress.reports.reading import Json, Run, name_of, records_by_stage, stages_of


def outcome(run: Run) -> str:
    """Returns the result of a run in one sentence.

    If the run is unfinished, or no stage has a result, the text begins with how far the run is.
    """
    sentence = outcome_of(run.result, before=run.before)
    if run.finished and sentence:
        return sentence
    return f"{progress(run)} {sentence}".strip()


def outcome_of(result: Json, *, before: Json | None = None, warn: bool = True) -> str:
    """Returns the sentence for the finished stages of a `result.json`; "" if there are none.

    Args:
        result: the content of `result.json`.
        before: the measured numbers of the model that was given to a command such as
            `fedpress prune`; None: no model was given.
        warn: whether to add a warning about the metric, such as that the model only guesses.

    >>> outcome_of({"stages": [{"kind": "train", "parameters": 1000, "accuracy": 0.9}]})
    'A model of 1.00 k parameters has a test accuracy of 90.00%.'
    """
    stages = [*([before] if before else []), *stages_of(result)]
    stages = changing_stages(stages)
    if not stages:
        return ""
    # Each part may be empty; together they are one sentence.
    parts = [_model(stages, given=bool(before)), _quality(stages), _clients(stages)]
    sentence = " ".join(part for part in parts if part)
    file = _file(stages)
    if file:
        sentence = f"{sentence}; {file}"
    warning = score_warning(stages) if warn else ""
    if warning:
        return f"{sentence}. But {warning}."
    return f"{sentence}."


def _model(stages: list[Json], *, given: bool) -> str:
    """Returns the number of parameters, and its share of the first model's parameters."""
    known = units.numbers(stages, "parameters")
    if not known:
        return "The model"
    first, last = known[0], known[-1]
    model = f"A model of {units.count(last)} parameters"
    if not first or first == last:
        return model
    whose = "the given one's" if given else "the first one's"
    return f"{model}, {units.percent(last / first, 1)} of {whose},"


def _quality(stages: list[Json]) -> str:
    """Returns the metric on the test set, with its standard error."""
    shown = MetricFormat.of(stages)
    measured = units.lines_with(stages, shown.key)
    if not measured:
        if examples_of(stages[-1]) == 0:
            return "was not measured on any test example"
        return f"has no test {shown.name}"
    last = measured[-1]
    spread = error_and_count(shown, last)
    if spread and not spread.startswith("±"):
        spread = f"({spread})"
    value = f"{shown.formatted(last[shown.key])} {spread}".rstrip()
    return f"has a test {shown.name} of {value}"


def _clients(stages: list[Json]) -> str:
    """Returns how many clients trained the model, with which epsilon, and the metric before."""
    federated = [stage for stage in stages if stage.get("kind") == "federate"]
    if not federated:
        return ""
    last = federated[-1]
    count = units.number(last.get("clients"))
    if count is None:
        who = "the clients"
    elif count == 1:
        who = "1 client"
    else:
        who = f"{count:.0f} clients"
    # An epsilon is stated only if it holds for the whole network.
    if all_private(federated):
        budget = f"with epsilon {units.epsilon(last.get('epsilon'))} per {_unit(last)}"
    else:
        budget = "without differential privacy"
    return f"after {who} trained it {budget}{_before_clients(federated[0], stages)}"


def _unit(stage: Json) -> str:
    # Recipes call the unit "sample"; the report says "example" everywhere.
    return {"sample": "example"}.get(str(stage.get("unit")), str(stage.get("unit")))


def _before_clients(first: Json, stages: list[Json]) -> str:
    """Returns the metric before the clients' training; "" if the test sets differ."""
    shown = MetricFormat.of(stages)
    before = units.number(first.get(f"{shown.key}_before"))
    if before is None or not same_test_set(first, stages[-1]):
        return ""
    return f" ({shown.formatted(before)} before)"


def _file(stages: list[Json]) -> str:
    """Returns the size and the latency of the last file; "" if no file was written."""
    written = [stage for stage in stages if stage.get("artifact")]
    if not written:
        return ""
    last = written[-1]
    kind = exported_format(last) or "packed"
    size_text = f"the {kind} file has {units.size(last.get('file_bytes'))}"
    # A packed file is unpacked before it runs, so its latency is the latency in torch.
    if not exported_format(last) or units.number(last.get("latency_ms")) is None:
        return size_text
    latency = units.milliseconds(last.get("latency_ms"))
    return f"{size_text} and answers in {latency} in {runtime_of(last)}"


def progress(run: Run) -> str:
    """Returns how far an unfinished run is.

    Example: "So far 2 of 4 stages have ended, and tune came to round 3 of 20."
    """
    planned = run.settings.get("stage")
    count = len(planned) if isinstance(planned, list) else None
    done = len(run.stages)
    # A damaged folder may hold more results than planned stages: then no "of" is shown.
    of = f" of {count}" if count is not None and count >= done else ""
    stages = "stages" if of or done != 1 else "stage"
    verb = "has" if done == 1 else "have"
    ended = f"{done}{of} {stages} {verb} ended"
    last: Json = {}
    for steps in records_by_stage(run.records):
        last = steps[-1]
    begun = last.get("stage")
    # The last records may belong to a finished stage, because some stages, such as export, write
    # none.
    if not isinstance(begun, int) or begun < done:
        return f"So far {ended}."
    name = name_of(last)
    for word, planned_key in (("round", "num_rounds"), ("epoch", "epochs")):
        if word in last:
            most = f" of {last[planned_key]}" if planned_key in last else ""
            return f"So far {ended}, and {name} came to {word} {last[word]}{most}."
    return f"So far {ended}, and {name} has begun."
