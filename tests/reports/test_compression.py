from __future__ import annotations

import pytest

from fedpress.pipeline.sweep import front
from fedpress.reports.comparison import comparison_table
from fedpress.reports.compression import (
    bits_per_layer,
    bytes_by_kind,
    density_over_epochs,
    sensitivity_curves,
)
from fedpress.reports.detail_tables import unchanged_table
from fedpress.reports.sweep import averages, sweep_table
from fedpress.reports.trade_off import trade_off, trade_offs

POINTS = [
    {"sensitivity": {"layer": layer, "density": d, "accuracy": a, "loss": 1.0}}
    for layer, row in {"stem": (0.9, 0.2), "<b>head": (0.95, 0.9)}.items()
    for d, a in zip((0.8, 0.2), row, strict=True)
]


def test_the_most_sensitive_layer_is_named_and_drawn_on_top():
    figure = sensitivity_curves("cut", POINTS)
    assert figure is not None
    assert "most sensitive is stem" in figure.caption
    last = figure.series[-1]
    assert (last.name, last.x, last.y) == ("stem", [20.0, 80.0], [20.0, 90.0])
    assert figure.series[0].name == "<b>head"


def test_density_is_drawn_with_lambda_where_there_is_one():
    plain = density_over_epochs("s", [{"epoch": 1, "density": 1.0}, {"epoch": 2, "density": 0.1}])
    assert plain is not None
    assert plain.caption.endswith("from 100.0% to 10.0%.")
    both = density_over_epochs("s", [{"epoch": 1, "expected_density": 0.5, "lambda_": 0.1}])
    assert both is not None
    assert [series.y for series in both.series] == [[50.0], [0.1]]


def test_bits_are_averaged_over_weights_and_bytes_are_sorted():
    record = {
        "quantized": [
            {"name": "a", "weights": 100, "bits": 8},
            {"name": "b", "weights": 300, "bits": 4},
        ]
    }
    figure = bits_per_layer("q", [record])
    assert figure is not None
    assert figure.caption.startswith("5.00 bits a weight")
    packed = bytes_by_kind(
        {"name": "pack", "file_bytes": 1500, "packed_bytes": {"masks": 500, "codes": 1000}}
    )
    assert packed is not None
    assert "the most goes into codes, 1.00 kB" in packed.caption
    assert packed.panels[0].y.names == ["codes", "masks"]
    assert packed.series[0].labels == ["1.00 kB", "500 B"]


@pytest.mark.parametrize(
    "bad", [[], [{"sensitivity": 3, "quantized": "?", "density": "x"}], [{"quantized": [{}]}]]
)
def test_records_without_numbers_make_no_figure(bad):
    assert sensitivity_curves("x", bad) is None
    assert density_over_epochs("x", bad) is None
    assert bits_per_layer("x", bad) is None
    assert bytes_by_kind({"packed_bytes": {"a": "?"}}) is None


def test_what_was_left_is_gathered_by_reason():
    stage = {
        "name": "q",
        "left": {f"layer{i}": "too small" for i in range(5)},
        "whole_layers": {"head": "an output"},
    }
    rows = unchanged_table([stage, {"name": "x", "left": "?"}]).rows
    assert rows == [
        ["q", "layer0, layer1, layer2 and 2 more", "too small"],
        ["q", "head", "an output"],
    ]


def test_before_and_after_are_compared():
    before = {"accuracy": 0.9, "file_bytes": 1000, "latency_ms": 2.0, "runtime": "torch"}
    rows = comparison_table(
        before, {"accuracy": 0.8, "file_bytes": 250, "latency_ms": 1.0, "runtime": "ort"}
    ).rows
    assert rows[0] == ["Accuracy", "90.00%", "80.00%", "-10.00 points"]
    assert rows[1] == ["File", "1.00 kB", "250 B", "25.0%"]
    assert rows[2] == ["Latency (torch → ort)", "2.0 ms", "1.0 ms", ""], (
        "no share of another runtime's time"
    )


def variant(name, accuracy, size, error=None):
    stage = {"name": "end", "accuracy": accuracy, "file_bytes": size, "latency_ms": size / 10}
    dense = {"name": "dense", "accuracy": 0.5, "file_bytes": 999}
    return {
        "name": name,
        "stages": [] if error else [dense, stage],
        "error": error,
        "overrides": [],
    }


def test_seeds_of_a_sweep_are_averaged_and_the_front_is_drawn_filled():
    variants = [
        variant("k=1 seed=0", 0.9, 100),
        variant("k=1 seed=1", 0.8, 100),
        variant("k=2 seed=0", 0.7, 300),
    ]
    page = {
        "variants": [*variants, variant("k=3 seed=0", 0, 0, "no")],
        "front_file_bytes": ["k=1 seed=0"],
    }
    rows = averages(page)
    assert rows[0]["accuracy"] == pytest.approx(0.85)
    assert rows[0]["accuracy_spread"] == pytest.approx(0.0707, abs=1e-3)
    table = sweep_table(page)
    assert table.rows[0][:4] == ["k=1", "●", "85.00% ± 7.07", "+0.00"]
    assert table.rows[2][2] == "failed"
    figure = trade_off(page, "file_bytes", "size")
    assert figure is not None
    within, beaten, best = figure.series
    assert len(within.x) == 1
    assert within.labels == ["first: dense"]
    assert (beaten.hollow, best.hollow) == (True, False)
    assert (best.x, best.y) == ([100.0], [90.0])
    assert best.labels == ["k=1 seed=0"]


def timed(name, runtime, latency, accuracy=0.9):
    first = {"name": "train", "accuracy": 0.95, "latency_ms": 40.0, "runtime": "torch"}
    end = {"name": "export", "accuracy": accuracy, "latency_ms": latency, "runtime": runtime}
    return {"name": name, "stages": [first, end], "error": None, "overrides": []}


def test_latency_is_compared_within_one_runtime_only():
    variants = [
        timed("a", "onnxruntime", 2.0),
        timed("b", "onnxruntime", 1.0, 0.8),
        timed("c", "openvino", 9.0, 0.7),
    ]
    page = {"variants": variants}
    page["front_latency_ms"] = front(page, "latency_ms")
    assert page["front_latency_ms"] == [
        "b",
        "a",
        "c",
    ]  # c has its own runtime, where nothing beats it
    figures = trade_offs(page, "latency_ms", "latency")
    assert [figure.title for figure in figures] == [
        "Accuracy against latency in onnxruntime",
        "Accuracy against latency in openvino",
    ]
    assert [list(series.x) for series in figures[0].series] == [
        [1.0, 2.0]
    ]  # nothing that was timed in torch
    assert sweep_table(page).rows[2][-1] == "9.0 ms in openvino"
