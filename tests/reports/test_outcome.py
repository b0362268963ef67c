from __future__ import annotations

from pathlib import Path

import pytest
from folders import CLIENTS, federate, result, train

from fedpress.reports.outcome import outcome, outcome_of
from fedpress.reports.reading import Run

SPREAD = {"accuracy_error": 0.0025, "test_examples": 10_000}


def measured(*stages: dict) -> dict:
    return {"stages": [dict(stage) for stage in stages], "finished": True}


def run(**parts) -> Run:
    return Run(path=Path("x"), **parts)


def test_a_whole_run_is_one_sentence():
    whole = result("x", CLIENTS, True)
    whole["stages"][-1] |= SPREAD | {"format": "onnx"}
    whole["stages"][3] |= SPREAD
    assert outcome_of(whole) == (
        "A model of 3.35 M parameters, 30.0% of the first one's, has a test accuracy of 93.12% ± 0.25 (n = 10,000) "
        "after 10 clients trained it with epsilon 7.90 per example (93.01% before); the ONNX file has 13.5 MB and "
        "answers in 2.1 ms in onnxruntime."
    )


def test_a_run_without_a_promise_says_so():
    assert "trained it without differential privacy" in outcome_of(result("x", CLIENTS, False))
    open_stage = {"kind": "federate", "clients": 1, "accuracy": 0.9}
    closed = {"kind": "federate", "clients": 4, "accuracy": 0.9, "epsilon": 1.0, "unit": "client"}
    assert "with epsilon 1.00 per client" in outcome_of(measured(closed))
    both = outcome_of(measured(closed, open_stage))
    assert "1 client trained it without differential privacy" in both


def test_one_stage_is_a_sentence_too():
    assert outcome_of(measured({"kind": "train", "parameters": 1000, "accuracy": 0.5})) == (
        "A model of 1.00 k parameters has a test accuracy of 50.00%."
    )
    packed = {
        "kind": "pack",
        "parameters": 1000,
        "artifact": "artifacts/model.packed.safetensors",
        "file_bytes": 900,
        "latency_ms": 3.0,
        "runtime": "torch",
    }
    told = outcome_of(measured(packed | {"accuracy": None, "test_examples": 0}))
    assert told == (
        "A model of 1.00 k parameters was not measured on any test example; the packed file has 900 B."
    )


def test_a_command_is_told_against_the_given_model():
    told = outcome_of(
        measured({"kind": "prune", "parameters": 400, "accuracy": 0.5}),
        before={"parameters": 1000, "accuracy": 0.6},
    )
    assert told.startswith("A model of 400 parameters, 40.0% of the given one's, has")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            {"task": "regression", "mae": 3.25, "mae_error": 0.125, "test_examples": 80},
            "a test MAE of 3.250 ± 0.125 (n = 80)",
        ),
        (
            {"task": "multilabel", "macro_f1": 0.5, "test_examples": 80},
            "a test macro F1 of 0.500 (n = 80)",
        ),
        ({"task": "regression", "mae": None, "test_examples": 80}, "has no test MAE."),
        ({"accuracy": None, "accuracy_warning": None}, "has no test accuracy."),
    ],
)
def test_each_task_is_told_by_its_own_metric(line, words):
    assert words in outcome_of(measured({"kind": "train", "parameters": 1000, **line}))


def test_a_model_that_guesses_is_not_praised():
    line = {"kind": "train", "accuracy": 0.9, "accuracy_warning": "it is no better than chance"}
    told = outcome_of(measured(line))
    assert told == "The model has a test accuracy of 90.00%. But it is no better than chance."


def test_an_unfinished_run_says_how_far_it_came():
    whole = result("x", CLIENTS, True)
    settings = {"stage": [{}] * 5}
    records = [*train(0, "train", 7, 0.94), *federate(3, CLIENTS, True)[:5]]
    half = {"stages": whole["stages"][:3], "finished": False}
    told = outcome(run(result=half, records=records, settings=settings))
    assert told.startswith(
        "So far 3 of 5 stages have ended, and federate came to round 5 of 20. A model of 3.35 M"
    )
    assert "onnx" not in told
    begun = outcome(run(records=train(0, "train", 7, 0.94)[:3], settings=settings))
    assert begun == "So far 0 of 5 stages have ended, and train came to epoch 3 of 7."
    assert outcome(run(recipe="name = 'x'")) == "So far 0 stages have ended."
    one = {"stages": whole["stages"][:1], "finished": False}
    assert outcome(run(result=one, records=records[:7])).startswith("So far 1 stage has ended. A")


def test_damaged_lines_are_no_reason_to_fail():
    stages = [
        {"clients": "many", "kind": "federate", "accuracy": "high", "artifact": 3, "format": []}
    ]
    assert outcome_of({"stages": stages}).startswith(
        "The model has no test accuracy after the clients"
    )
    assert outcome_of({"stages": "x"}) == ""
    assert outcome(run(records=[{"stage": "x", "epoch": []}])) == "So far 0 stages have ended."
