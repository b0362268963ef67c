"""What is measured: every runtime in turn, memory of a fresh process, and a roof that bounds."""

import pytest
import torch
from torch import nn

from fedpress.deploy import Candidate, Job, export_onnx, measure, peak_memory
from fedpress.deploy.roofline import Peak, peak, roofline
from fedpress.deploy.timing import Timing
from fedpress.errors import ExportError


@pytest.mark.recipe
def test_a_model_and_its_file_are_measured_in_turn(tmp_path):
    model = nn.Linear(2000, 4000)
    path = export_onnx(model, tmp_path / "m.onnx", Job((2000,))).path
    threads = torch.get_num_threads()
    candidates = {
        name: Candidate(runs, macs=8_000_000, activations=4000)
        for name, runs in (("torch", model), ("file", path))
    }
    found = measure(candidates, (2000,), batches=(1, 3), seconds=0.01)
    assert [(r["name"], r["runtime"]) for r in found] == [
        ("torch", "torch"),
        ("file", "onnxruntime"),
    ]
    for record in found:
        assert [(t["threads"], t["batch"]) for t in record["timings"]] == [
            (1, 1),
            (1, 3),
            (2, 1),
            (2, 3),
        ]
        for time in record["timings"]:
            assert 0 < time["best_ms"] <= time["p25_ms"] <= time["median_ms"] <= time["p75_ms"]
            assert time["runs"] >= 5
        assert record["peak_memory"] > 30e6, "the weights alone are 32 MB"
    assert found[0]["file_bytes"] == 4 * (2000 * 4000 + 4000)
    assert found[1]["file_bytes"] == path.stat().st_size
    assert found[0]["timings"][0]["runs"] == found[1]["timings"][0]["runs"], (
        "in turn, so equally often"
    )
    assert torch.get_num_threads() == threads


@pytest.mark.recipe
def test_the_memory_of_a_broken_file_is_told(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"memory of .*m\.onnx cannot be measured: .*cannot load"):
        peak_memory(tmp_path / "m.onnx", (4,))


def test_the_peak_of_this_machine_is_a_roof():
    found = peak(seconds=0.05, size=128)
    assert found.float_gmacs > 0.1
    assert found.int8_gmacs > 0.1
    assert found.gigabytes > 0.1


@pytest.mark.parametrize(
    ("weights", "int8", "bound", "share"),
    [
        (1_000, False, "arithmetic", 0.2),
        (1_000, True, "arithmetic", 0.1),
        (100_000_000, False, "memory", 2.0),
    ],
)
def test_the_roof_is_arithmetic_or_the_bandwidth(weights, int8, bound, share):
    second = Timing(
        batch=1, threads=1, median_ms=5e3, p25_ms=1, p75_ms=9e3, best_ms=1, cpu_ms=1e3, runs=9
    )
    top = Peak(float_gmacs=50, int8_gmacs=100, gigabytes=0.05)
    found = roofline(second, top, macs=10**10, weight_bytes=weights, activations=0, int8=int8)
    assert found.bound == bound
    assert found.gmacs == pytest.approx(10)
    assert found.share == pytest.approx(share)
