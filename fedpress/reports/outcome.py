"""One sentence that says what came out of a run: first on its page, last in the terminal."""

from __future__ import annotations

from fedpress.reports import units
from fedpress.reports.alike import (
    changing_stages,
    examples_of,
    exported_format,
    runtime_of,
    same_test_set,
)
from fedpress.reports.headline import score_warning, spread_told
from fedpress.reports.metrics import Shown
from fedpress.reports.protection import protects
from fedpress.reports.reading import Json, Run, name_of, records_by_stage, stages_of


def outcome(run: Run) -> str:
    """Returns what came out of a run, finished or not, and a warning where one is due."""
    said = outcome_of(run.result, before=run.before)
    if run.finished and said:
        return said
    far = _how_far(run)
    return f"{far} {said}".strip()


def outcome_of(result: Json, *, before: Json | None = None, warn: bool = True) -> str:
    """Returns the sentence for the stages of a `result.json` that have ended; empty if none has.

    Args:
        result: what the run folder holds.
        before: the line of the model that a command was given.
        warn: whether a second sentence says why the metric is worth nothing, where it is.

    >>> outcome_of({"stages": [{"kind": "train", "parameters": 1000, "accuracy": 0.9}]})
    'A model of 1.00 k parameters has a test accuracy of 90.00%.'
    """
    stages = [*([before] if before else []), *stages_of(result)]
    stages = changing_stages(stages)
    if not stages:
        return ""
    parts = [_model(stages, given=bool(before)), _worth(stages), _clients(stages)]
    sentence = " ".join(part for part in parts if part)
    ends = [part for part in (sentence, _file(stages)) if part]
    if not ends:
        return ""
    warning = score_warning(stages) if warn else ""
    return "; ".join(ends) + "." + (f" But {warning}." if warning else "")


def _model(stages: list[Json], *, given: bool) -> str:
    """Names the model by its size, beside that of the first one."""
    known = units.numbers(stages, "parameters")
    if not known:
        return "The model"
    first, last = known[0], known[-1]
    model = f"A model of {units.count(last)} parameters"
    if not first or first == last:
        return model
    whose = "the given one's" if given else "the first one's"
    return f"{model}, {units.percent(last / first, 1)} of {whose},"


def _worth(stages: list[Json]) -> str:
    """Says what the model is worth on the test set, with the standard error."""
    shown = Shown.of(stages)
    measured = [stage for stage in stages if shown.value(stage) is not None]
    if not measured:
        if examples_of(stages[-1]) == 0:
            return "was not measured on any test example"
        return f"has no test {shown.name}"
    last = measured[-1]
    spread = spread_told(shown, last)
    if spread and not spread.startswith("±"):
        spread = f"({spread})"
    value = f"{shown.formatted(last[shown.key])} {spread}".rstrip()
    return f"has a test {shown.name} of {value}"


def _clients(stages: list[Json]) -> str:
    """Says who trained it where the data is private, for which epsilon, and what that changed."""
    federated = [stage for stage in stages if stage.get("kind") == "federate"]
    if not federated:
        return ""
    last = federated[-1]
    count = units.number(last.get("clients"))
    who = "the clients" if count is None else f"{count:.0f} client{'' if count == 1 else 's'}"
    if protects(federated):
        budget = f"with epsilon {units.epsilon(last.get('epsilon'))} per {_unit(last)}"
    else:
        budget = "without differential privacy"
    return f"after {who} trained it {budget}{_before_clients(federated[0], stages)}"


def _unit(stage: Json) -> str:
    return {"sample": "example"}.get(str(stage.get("unit")), str(stage.get("unit")))


def _before_clients(first: Json, stages: list[Json]) -> str:
    """Gives the metric before the clients' training, if it was measured on the same test set."""
    shown = Shown.of(stages)
    before = units.number(first.get(f"{shown.key}_before"))
    if before is None or not same_test_set(first, stages[-1]):
        return ""
    return f" ({shown.formatted(before)} before)"


def _file(stages: list[Json]) -> str:
    """Says how large the last file is and how fast it runs, if a file was written."""
    written = [stage for stage in stages if stage.get("artifact")]
    if not written:
        return ""
    last = written[-1]
    kind = exported_format(last) or "packed"
    said = f"the {kind} file has {units.size(last.get('file_bytes'))}"
    # A packed file is unpacked before it runs: its line has the latency of the model in torch.
    if not exported_format(last) or units.number(last.get("latency_ms")) is None:
        return said
    return (
        f"{said} and answers in {units.milliseconds(last.get('latency_ms'))} in {runtime_of(last)}"
    )


def _how_far(run: Run) -> str:
    """Says how many stages of an unfinished run have ended, and where the next one stands."""
    planned = run.settings.get("stage")
    count = len(planned) if isinstance(planned, list) else None
    done = len(run.stages)
    of = f" of {count}" if count is not None and count >= done else ""
    stages = "stages" if of or done != 1 else "stage"
    ended = f"{done}{of} {stages} {'has' if done == 1 else 'have'} ended"
    last = next((steps[-1] for steps in reversed([*records_by_stage(run.records)])), {})
    begun = last.get("stage")
    # The records of a stage that has ended stay, and a stage such as export leaves none.
    if not isinstance(begun, int) or begun < done:
        return f"So far {ended}."
    name = name_of(last)
    for word, of_all in (("round", "num_rounds"), ("epoch", "epochs")):
        if word in last:
            most = f" of {last[of_all]}" if of_all in last else ""
            return f"So far {ended}, and {name} came to {word} {last[word]}{most}."
    return f"So far {ended}, and {name} has begun."
