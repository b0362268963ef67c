import io

import pytest
from rich.console import Console

from fedpress.api.progress import BarsView, bars, follow, watch
from fedpress.cli import terminal
from fedpress.workspace.state import StageFinished, StageStarted, Tick

RESULT = {"accuracy": 0.924, "parameters": 3_352_189}


def events():
    yield StageStarted(0, "train", "a-very-long-name-of-a-stage", reused=True)
    yield StageFinished(0, RESULT)
    yield StageStarted(1, "train", "fine [red]tune")
    yield Tick(500, 1000, "epoch 12/26, loss 0.123")
    yield Tick(501, 1000, "epoch 12/26, loss 0.123")
    yield Tick(1000, 1000, "epoch 26/26, loss 0.123, validation 92.40%")
    yield Tick(1, 1, "measuring on 10,000 test examples")
    yield StageFinished(1, RESULT)


def shown(terminal_: bool, told) -> str:
    out = io.StringIO()
    follow(
        told, Console(file=out, force_terminal=terminal_, width=80, color_system=None, _environ={})
    )
    return out.getvalue()


def test_a_log_file_gets_a_line_for_each_news():
    assert shown(False, events()).splitlines() == [
        "a-very-long-name-of-a-stage: already done",
        "a-very-long-name-of-a-stage: test accuracy 92.40%, 3.35 M parameters",
        "fine [red]tune: starting",
        "fine [red]tune: epoch 12/26, loss 0.123",
        "fine [red]tune: epoch 26/26, loss 0.123, validation 92.40%",
        "fine [red]tune: measuring on 10,000 test examples",
        "fine [red]tune: test accuracy 92.40%, 3.35 M parameters",
    ]


@pytest.mark.parametrize("in_terminal", [True, False])
def test_a_warning_stays_on_the_screen_once_and_whole(in_terminal):
    warning = "round 1: 2 of 6 clients refused: c2 ([red]why[/]), " + "and more " * 12

    def told():
        yield StageStarted(0, "federate", "rounds")
        yield Tick(1, 3, "round 1", warning)
        yield Tick(2, 3, "round 2")
        yield StageFinished(0, RESULT)

    assert shown(in_terminal, told()).count(f"rounds: {warning}") == 1


def test_bars_fit_into_80_columns_and_say_the_accuracy():
    lines = shown(True, events()).replace("\r", "\n").splitlines()
    plain = [line.split("\x1b[")[0] for line in lines]
    assert max(len(line) for line in plain) <= 80
    last = [line for line in plain if "100%" in line][-2:]
    assert all("test accuracy 92.40%, 3.35 M parameters" in line for line in last)


def test_the_time_left_of_a_resumed_stage_does_not_count_what_was_done_before():
    now = [0.0]
    out = Console(file=io.StringIO(), force_terminal=True, width=80, get_time=lambda: now[0])
    left = []

    def slow():
        yield StageStarted(0, "train", "train")
        for done in range(900, 905):
            yield Tick(done, 1000)
            now[0] += 10.0

    real = bars(out)
    real.get_time = lambda: now[0]

    def watched():
        for event in slow():
            yield event
            left.append(real.tasks[-1].time_remaining)

    with real:
        watch(watched(), BarsView(real))
    assert left[-1] == pytest.approx(10 * 96, rel=0.1)


def test_a_check_shows_facts_without_reading_names_as_markup():
    out = io.StringIO()
    console = Console(file=out, width=80, color_system=None)
    data = {"clients": {"c0": {}}, "shape": [3, 32, 32], "classes": ["a"] * 10}
    data |= {"private": 6000, "public": 42000, "validation": 2000, "test": 10000}
    line = {
        "kind": "prune",
        "name": "cut",
        "parameters": 3_352_189,
        "macs": 10**8,
        "channels": "64→24, [bold]",
    }
    facts = {
        "bytes_up_per_round": 15_100,
        "epsilon": 7.991,
        "examples_per_client": [600, 720],
        "share": 0.123456,
    }
    terminal.show_check(console, "x [bold]", data, [line | facts])
    text = " ".join(out.getvalue().split())
    assert (
        "data: 1 clients; 6,000 private, 42,000 public, 2,000 validation, 10,000 test; 3x32x32, 10 classes"
        in text
    )
    assert "0 cut (prune): 3.35 M parameters, 100 MMAC" in text
    for part in ("x [bold]", "64→24, [bold]", "15.1 kB", "8.00", "600 to 720", "0.1235"):
        assert part in text
    assert max(len(row) for row in out.getvalue().splitlines()) <= 80


def test_measured_models_stand_in_two_tables_that_fit_the_screen():
    timing = {"batch": 1, "threads": 1, "median_ms": 1234.5, "p25_ms": 1000.0, "p75_ms": 1246.0}
    timing |= {"roofline": {"share": 0.5, "bound": "arithmetic"}}
    peak = {"float_gmacs": 40.0, "int8_gmacs": 80.0, "gigabytes": 10.0}
    long = "runs/a-very-long-name-of-a-run/model"
    record = {
        "runtime": "onnxruntime",
        "parameters": 10,
        "macs": 20,
        "file_bytes": 30,
        "peak_memory": None,
    }
    record |= {
        "timings": [timing | {"batch": b, "threads": t} for b in (1, 64) for t in (1, 2)],
        "machine": peak,
    }
    out = Console(file=io.StringIO(), width=80)
    terminal.show_measures(
        out, [record | {"name": name} for name in (long, f"{long} as onnx int8", "short")]
    )
    lines = out.file.getvalue().splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert [line.split()[1] for line in lines[1:4]] == ["…-a-run/model", "as", "short"]
    assert "1234 ±120 ms" in lines[6]


@pytest.mark.parametrize("in_terminal", [True, False])
def test_what_a_stage_tells_beside_its_numbers_is_printed_once(in_terminal):
    told = {"keep_params": "0.5066, the nearest to 0.5 that the widths allow"}

    def events_of_a_cut():
        yield StageStarted(0, "prune", "cut")
        yield StageFinished(0, {**RESULT, "told": told})

    lines = shown(in_terminal, events_of_a_cut())
    assert lines.count("cut: keep_params is 0.5066, the nearest to 0.5 that the widths allow") == 1


GUESSER = {
    "kind": "train",
    "name": "train",
    "accuracy": 0.91,
    "majority_share": 0.91,
    "balanced_accuracy": 0.5,
}
GUESSER |= {
    "auc": 0.4871,
    "accuracy_warning": "it is no better than always answering '[b]x[/]' (91.0% of the test examples)",
}


def test_the_end_of_a_run_says_what_its_accuracy_is_worth():
    def ended(*stages) -> str:
        out = io.StringIO()
        terminal.show_metrics(
            Console(file=out, width=80, color_system=None), {"stages": list(stages)}
        )
        return out.getvalue()

    text = ended(GUESSER)
    assert text.split("\n")[2].split() == ["train", "91.00%", "91.00%", "50.00%", "0.487"]
    assert f"warning: {GUESSER['accuracy_warning']}" in text
    better = GUESSER | {"accuracy": 0.95, "auc": None, "accuracy_warning": None}
    assert "warning" not in ended(GUESSER, better), "a later stage has mended it"
    assert ended(GUESSER, better).splitlines()[-1].split()[-1] == "–"
    assert ended({"kind": "train", "accuracy": 0.5}) == "", "an older run folder"


def test_a_command_warns_of_a_model_that_guesses():
    out = io.StringIO()
    terminal.show_result(Console(file=out, width=80, color_system=None), GUESSER, GUESSER)
    text = out.getvalue()
    assert "Balanced accuracy" in text
    assert f"warning: {GUESSER['accuracy_warning']}" in text
