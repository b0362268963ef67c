from __future__ import annotations

import io

import pytest
from folders import CLIENTS, federate, result, train
from rich.console import Console

from fedpress.reports.comparison import comparison_table
from fedpress.reports.detail_tables import failure_table, ledger_table, progress_table
from fedpress.reports.stage_table import rich_table, spread_explained, stage_table


def test_the_table_has_a_line_per_stage_with_numbers_for_people():
    table = stage_table(result("x", CLIENTS, private=True))
    header = ["Stage", "Accuracy", "Params", "MACs", "Size", "Latency", "Up", "Down", "ε", "Time"]
    assert table.header == header
    assert table.rows[0] == [
        "train",
        "93.85%",
        "11.2 M",
        "557 M",
        "44.8 MB",
        "13.2 ms",
        "–",
        "–",
        "–",
        "41 min",
    ]
    federated = [
        "93.12% (-0.73)",
        "3.35 M (30.0%)",
        "168 M",
        "13.4 MB",
        "4.6 ms",
        "2.68 GB",
        "2.68 GB",
        "7.90",
    ]
    assert table.rows[3] == ["federate", *federated, "21 min"]
    assert len(table.rows) == 5


def test_a_federated_stage_without_privacy_says_none():
    table = stage_table(result("x", CLIENTS, private=False))
    assert [row[table.header.index("ε")] for row in table.rows] == ["–", "–", "–", "none", "–"]


def test_a_column_that_no_stage_fills_is_left_out():
    table = stage_table({"stages": [{"kind": "train", "name": "train", "accuracy": 0.5}]})
    assert table.header == ["Stage", "Accuracy"]
    assert table.rows == [["train", "50.00%"]]


@pytest.mark.parametrize("stages", [None, [], "x", [None, 3]])
def test_a_result_without_stages_is_an_empty_table(stages):
    assert stage_table({"stages": stages}).rows == []


def test_a_stage_of_unknown_kind_has_its_row():
    known = {"kind": "train", "accuracy": 0.5, "parameters": 10}
    table = stage_table(
        {
            "stages": [
                known,
                {"kind": "teleport", "accuracy": "high", "parameters": 0, "seconds": -1},
            ]
        }
    )
    assert table.rows[1][:2] == ["teleport", "–"]
    assert table.rows[0][0] == "train"


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_is_cut_off_in_a_terminal(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(result("x", CLIENTS, private=True)))
    text = console.export_text()
    assert "…" not in text
    for number in ("93.12%", "(-0.73)", "(30.0%)", "13.2 ms", "2.68 GB", "41 min", "7.90"):
        assert number in text


def test_brackets_in_a_name_are_no_markup_in_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(rich_table({"stages": [{"name": "[red]x[/blue]", "accuracy": 0.5}]}))
    assert "[red]x[/blue]" in console.export_text()


def test_the_progress_of_an_unfinished_run_is_told_per_stage():
    table = progress_table([*train(0, "train", 7, 0.94), *federate(3, CLIENTS, True)[:5]])
    assert [row[:2] for row in table.rows] == [
        ["train", "epoch 7 of 7"],
        ["federate", "round 5 of 20"],
    ]
    assert table.rows[0][3:] == ["–", "35 min"]  # epochs say the time so far, rounds their own
    assert table.rows[1][3:] == ["4.65", "5 min 8 s"]


def test_clients_with_the_same_charge_share_a_row_of_the_ledger():
    charge = {
        "what": "federate",
        "sampling_prob": 0.1,
        "noise_multiplier": 1.02,
        "steps": 200,
        "last_round": 20,
    }
    others = [{"who": f"c{i}", "first_round": 1, **charge} for i in range(3)]
    table = ledger_table(
        {"unit": "sample", "charges": [*others, {"who": "population", "what": "prune", "steps": 1}]}
    )
    assert table is not None
    assert table.rows == [
        ["federate", "3 clients", "0.1", "1.02", "200", "1 to 20"],
        ["prune", "population", "–", "–", "1", "–"],
    ]
    assert ledger_table({}) is None


def failing(**failures):
    return {"kind": "federate", "name": "rounds", "accuracy": 0.5, "failures": failures}


def test_answers_that_do_not_count_are_in_the_table_and_listed_by_client():
    clients = {"c2": {"rounds": 3, "reason": "why [not]"}, "c4": {"rounds": 1, "reason": "other"}}
    stage = failing(asked=12, refused=4, clients=clients)
    table = stage_table({"stages": [stage]})
    assert dict(zip(table.header, table.rows[0], strict=True))["Failed"] == "4 of 12"
    assert failure_table([stage]).rows == [
        ["rounds", "c2", "3 refused", "why [not]"],
        ["rounds", "c4", "1 refused", "other"],
    ]


def test_a_noised_count_is_shown_where_it_is_surely_above_its_noise():
    counted = {
        "unit": "sample",
        "not_finite": -0.5,
        "failed": 60.2,
        "of": 80.0,
        "noise": 0.4,
        "sure": True,
    }
    stage = failing(asked=12, refused=0, clients={}, counted=counted)
    assert stage_table({"stages": [stage]}).rows[0][-1] == "≈60 of 80"
    assert failure_table([stage]).rows == [
        [
            "rounds",
            "all examples, counted with noise",
            "≈60 of 80",
            "the model could not run on them",
        ]
    ]
    quiet = failing(asked=12, refused=0, clients={}, counted=counted | {"sure": False})
    assert "Failed" not in stage_table({"stages": [quiet]}).header
    assert failure_table([quiet]).rows == []


def test_records_tell_who_was_refused_before_there_is_a_result():
    records = [
        {"stage": 0, "name": "rounds", "round": 1, "refused": {"c1": "first"}},
        {"stage": 0, "name": "rounds", "round": 2, "refused": {"c1": "last"}},
        {"stage": 1, "name": "more", "round": 1, "refused": {}},
    ]
    assert failure_table([], records).rows == [["rounds", "c1", "2 refused", "last"]]
    done = [failing(asked=2, refused=0, clients={})]
    assert failure_table(done, records).rows == []


@pytest.mark.parametrize("failures", [None, [], "x", {}, {"clients": None, "counted": None}])
def test_a_stage_that_says_nothing_of_failures_has_no_row(failures):
    assert failure_table([{"name": "rounds", "kind": "federate", "failures": failures}]).rows == []


def with_errors(n: int = 539):
    lines = result("x", CLIENTS, private=True)
    for stage in lines["stages"]:
        stage |= {"accuracy_error": 0.0108, "test_examples": n}
    return lines


def test_the_standard_error_and_the_number_of_examples_stand_beside_the_accuracy():
    table = stage_table(with_errors())
    assert table.header[1] == "Accuracy (n=539)"
    assert table.rows[0][1] == "93.85% ± 1.08"
    assert table.rows[3][1] == "93.12% ± 1.08 (-0.73)"
    without = stage_table(with_errors(), errors=False)
    assert (without.header[1], without.rows[3][1]) == ("Accuracy", "93.12% (-0.73)")


def test_accuracies_of_different_test_sets_are_not_compared():
    lines = with_errors()
    lines["stages"][-1]["test_examples"] = 100
    table = stage_table(lines)
    assert table.header[1] == "Accuracy"
    assert table.rows[-1][1] == "93.12% ± 1.08"
    assert table.rows[3][1].endswith("(-0.73)")


def test_a_task_without_a_standard_error_has_its_number_of_examples():
    line = {"kind": "train", "task": "multilabel", "macro_f1": 0.5, "test_examples": 80}
    table = stage_table({"stages": [line]})
    assert table.header[1] == "Macro F1 (n=80)"
    assert table.rows[0][1] == "0.500"
    assert spread_explained({"stages": [line]}) == "Measured on 80 test examples."
    assert spread_explained({"stages": [{"kind": "train", "accuracy": 0.5}]}) == ""


@pytest.mark.parametrize(("width", "told"), [(60, False), (100, True)])
def test_the_terminal_shows_standard_errors_where_there_is_room(width, told):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(rich_table(with_errors(), width=width))
    assert ("± 1.08" in console.export_text()) == told


def test_sizes_of_different_kinds_of_files_are_not_compared():
    before = {"accuracy": 0.9, "file_bytes": 1000, "latency_ms": 2.0, "runtime": "torch"}
    file = {"artifact": "artifacts/model.onnx", "format": "onnx", "runtime": "onnxruntime"}
    rows = comparison_table(before, before | file).rows
    assert rows[1] == ["File (numbers alone → ONNX)", "1.00 kB", "1.00 kB", ""]
    assert rows[2] == ["Latency (torch → onnxruntime)", "2.0 ms", "2.0 ms", ""]
    alike = comparison_table(before, before | {"file_bytes": 500}).rows
    assert alike[1] == ["File", "1.00 kB", "500 B", "50.0%"]
    other = comparison_table(before | {"test_examples": 10}, before | {"test_examples": 20}).rows
    assert other[0] == ["Accuracy", "90.00%", "90.00%", ""]
