from __future__ import annotations

from fedpress.reports.comparable import (
    changing_stages,
    common_examples,
    exported_format,
    same_test_set,
)


def test_stages_on_one_test_set_have_its_size_in_common():
    assert common_examples([{"test_examples": 539}, {"test_examples": 539}]) == 539
    assert common_examples([{"test_examples": 539}, {"test_examples": 100}]) is None
    assert common_examples([{"test_examples": 539}, {}]) is None
    assert common_examples([]) is None


def test_lines_of_older_runs_are_of_one_test_set():
    assert same_test_set({}, {})
    assert not same_test_set({"test_examples": 539}, {})


def test_a_packed_file_is_none_for_a_device():
    assert exported_format({"artifact": "artifacts/model.packed.safetensors"}) == ""
    assert exported_format({"artifact": "artifacts/model.tflite", "format": "litert"}) == "LiteRT"
    assert exported_format({"artifact": "artifacts/model.xyz", "format": "xyz"}) == "xyz"
    assert exported_format({"format": ["damaged"], "artifact": "x"}) == ""


def test_a_measure_stage_is_no_change():
    prune, measure = {"kind": "prune"}, {"kind": "measure"}
    assert changing_stages([prune, measure]) == [prune]
    assert changing_stages([measure]) == [measure]
