from __future__ import annotations

from folders import CLIENTS, result

from fedpress.reports.headline import tiles


def test_the_last_numbers_stand_beside_those_of_the_first_stage():
    shown = {
        tile.name: (tile.value, tile.note) for tile in tiles(result("x", CLIENTS, True)["stages"])
    }
    assert shown == {
        "test accuracy": ("93.12%", "-0.73 points against the first stage"),
        "parameters": ("3.35 M", "30.0% of 11.2 M"),
        "file size": ("13.5 MB", "30.2% of 44.8 MB"),
        "latency": ("2.1 ms", "in onnxruntime; in torch 4.6 ms, 34.8% of 13.2 ms"),
        "privacy spent, ε": ("7.90", "at δ = 1e-5, per sample"),
        "bytes sent": ("5.36 GB", "2.68 GB up, 2.68 GB down"),
    }


def test_bytes_before_the_first_round_are_told_apart():
    rounds = {"bytes_up": 3e6, "bytes_down": 2e6}
    before = {"set_up_bytes_up": 4e3, "set_up_bytes_down": 6e3}
    (tile,) = (tile for tile in tiles([rounds | before]) if tile.name == "bytes sent")
    assert tile.note == "3.00 MB up, 2.00 MB down; 10.0 kB before the first round"


def test_a_latency_is_a_share_of_one_in_the_same_runtime_alone():
    def note(*measured):
        stages = [{"latency_ms": ms, "runtime": runtime} for ms, runtime in measured]
        return next(tile.note for tile in tiles(stages) if tile.name == "latency")

    assert note((8.0, "torch"), (4.0, "torch")) == "50.0% of 8.0 ms"
    exported = note((8.0, "torch"), (4.0, "torch"), (1.0, "onnxruntime"))
    assert exported == "in onnxruntime; in torch 4.0 ms, 50.0% of 8.0 ms"
    assert note((8.0, "torch"), (4.0, "torch, simulated")) == "in torch, simulated; in torch 8.0 ms"
    mixed = note((8.0, "torch"), (4.0, "onnxruntime"), (6.0, "torch"), (1.0, "onnxruntime"))
    assert mixed == "in onnxruntime, 25.0% of 4.0 ms; in torch 6.0 ms, 75.0% of 8.0 ms"


def test_one_open_stage_makes_the_privacy_of_the_run_none():
    private = result("x", CLIENTS, True)["stages"]
    for stages in (
        result("x", CLIENTS, False)["stages"],
        [{"kind": "federate"}, *private],
        [*private, {"kind": "federate"}],
    ):
        assert "none" in [tile.value for tile in tiles(stages)]


def test_balanced_accuracy_stands_beside_accuracy():
    line = {
        "kind": "train",
        "accuracy": 0.91,
        "majority_share": 0.912,
        "balanced_accuracy": 0.5,
        "auc": 0.4871,
    }
    assert [(t.value, t.name, t.note) for t in tiles([line])][1] == (
        "50.00%", "balanced accuracy", "AUC 0.487; largest class: 91.2% of the test examples"
    )  # fmt: skip
    assert tiles([line | {"auc": None}])[1].note == "largest class: 91.2% of the test examples"


def test_what_was_not_measured_has_no_tile():
    assert tiles([]) == []
    line = {"kind": "export", "file_bytes": 3_400_000}
    assert tiles([line, {"kind": "measure", "file_bytes": 44_000_000}])[0].value == "3.40 MB"
    assert tiles([{"kind": "measure", "file_bytes": 44_000_000}])[0].value == "44.0 MB"
    assert [
        tile.name for tile in tiles([{"kind": "train", "accuracy": 0.5, "parameters": None}])
    ] == ["test accuracy"]
    assert tiles([{"parameters": 0}, {"parameters": 5}])[0].note == ""


def test_what_stays_float_is_a_tile_when_it_is_more_than_a_tenth():
    line = {"kind": "quantize", "float_share": 0.337, "mostly_float": ["embed", "head"]}
    assert [(t.value, t.name, t.note) for t in tiles([line, {"kind": "pack"}])] == [
        ("34%", "of the parameters stay float", "most in embed, head")
    ]
    assert tiles([line | {"float_share": 0.1}]) == []
    assert tiles([line, {"kind": "quantize", "float_share": 0.02}]) == []


def test_the_accuracy_has_its_standard_error_and_number_of_examples():
    line = {"kind": "train", "accuracy": 0.9, "accuracy_error": 0.0108, "test_examples": 539}
    (tile,) = tiles([line])
    assert tile.note == "± 1.08 (n = 539)"
    assert tiles([line, line | {"accuracy": 0.95}])[0].note == (
        "± 1.08 (n = 539); +5.00 points against the first stage"
    )
    other = tiles([line, line | {"test_examples": 100}])[0].note
    assert other == "± 1.08 (n = 100); the first stage was measured on other test examples"


def test_an_exported_file_is_not_compared_with_the_numbers_alone():
    def note(*stages):
        return next(tile.note for tile in tiles(list(stages)) if tile.name == "file size")

    dense, small = {"file_bytes": 1000}, {"file_bytes": 400}
    onnx = {"file_bytes": 430, "artifact": "artifacts/model.onnx", "format": "onnx"}
    assert note(dense, small) == "40.0% of 1.00 kB"
    assert note(dense, small, onnx) == "ONNX; the numbers alone: 400 B, 40.0% of 1.00 kB"
    assert note(onnx, onnx | {"file_bytes": 215}) == "50.0% of 430 B"
    assert (
        note(dense, {"file_bytes": 100, "artifact": "x.packed.safetensors"}) == "10.0% of 1.00 kB"
    )
