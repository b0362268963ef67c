"""The benchmark of simulators: its table, its messages, and a tiny run without the rivals."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def loaded(path: Path) -> ModuleType:
    """Imports a program by its path: the benchmarks are no package."""
    spec = util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    return loaded(BENCHMARKS / "simulation.py")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "simulation.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def record(arm: str, rounds: list[float], turn: str, **more: Any) -> dict[str, Any]:
    facts = {"processor": "P", "threads": 2, "cores": 2, "others": 0.1, "data": "made images"}
    times = {"start": 1.0, "rounds": rounds, "end": 2.0, "accuracy": 0.5, "at": "now"}
    versions = {"versions": {"torch": "2"}}
    return {"arm": arm, "turn": turn, "trained": 100, **facts, **times, **versions, **more}


def test_the_network_has_the_parameters_of_pfls_benchmark():
    model = loaded(BENCHMARKS / "rivals" / "shared.py").cnn()
    assert sum(p.numel() for p in model.parameters()) == 1_626_442


def test_images_are_normalised_by_channel():
    shared = loaded(BENCHMARKS / "rivals" / "shared.py")
    x = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    expected = [(1 - mean) / std for mean, std in zip(shared.MEAN, shared.STD, strict=True)]
    assert shared.normalised(x)[0, :, 0, 0].tolist() == pytest.approx(expected)


def test_the_table_leaves_the_first_round_out_and_compares_within_a_turn(simulation):
    ours, other = "fedpress/local/float32", "pfl/local/float32"
    records = [
        record(ours, [9.0, 1.0, 3.0], "a"),
        record(other, [9.0, 4.0, 4.0], "a"),
        record(ours, [9.0, 4.0, 4.0], "b"),
        record(other, [9.0, 4.0, 4.0], "b"),
        record(other, [9.0, 100.0], "a turn without fedpress"),
    ]
    shown = simulation.table(records)
    # Rounds of 2 and 4 seconds with 100 images each: 50 and 25 images a second.
    assert f"| {ours} | 2 | 3.00 (2.00-4.00) | 38 | 9.0 | 1.0 | 2.0 | 50.0% |" in shown
    assert f"| {other} | 1.50 (1.00-2.00) |" in shown
    assert f"| {ours} | - |" in shown


def test_a_failed_run_stands_below_the_table(simulation):
    failed = {"arm": "pfl/local/float32", "turn": "a", "error": "exit status 1"}
    shown = simulation.table([record("plain/processes/bf16", [1.0, 1.0], "a"), failed])
    assert shown.endswith("failed: pfl/local/float32: exit status 1")


def test_an_unknown_simulator_is_refused_with_the_names():
    told = run("--only", "plf/local/float32").stderr
    assert "got 'plf/local/float32', expected NAME/ENGINE/PRECISION" in told
    assert "pfl" in told


def test_a_missing_rival_is_refused_with_the_command_that_installs_it(tmp_path):
    told = run("--tiny", "--only", "pfl/local/float32", "--environments", str(tmp_path)).stderr
    assert f"pfl is not in {tmp_path}: run simulation.py --prepare --only 'pfl/*'" in told


def test_an_environment_of_other_pins_is_made_anew(simulation, tmp_path, monkeypatch):
    steps = []

    def done(command: list[str]) -> subprocess.CompletedProcess[str]:
        steps.append(command)
        # The first command would make this folder.
        (tmp_path / "pfl").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(simulation.subprocess, "run", done)
    simulation.prepare(tmp_path, ["pfl"])
    made = len(steps)
    assert made > 0
    simulation.prepare(tmp_path, ["pfl"])
    assert len(steps) == made
    monkeypatch.setitem(simulation.PINS, "pfl", ("torch==2.13.0", "pfl==0.7.0"))
    simulation.prepare(tmp_path, ["pfl"])
    assert len(steps) == 2 * made
    assert "pfl==0.7.0" in steps[-1]


def test_held_out_images_are_in_no_client(simulation, tmp_path):
    size = simulation.Size(clients=3, images=4, cohort=2, batch=2, held=5)
    assert simulation.write_arrays(tmp_path, None, size) == "made images"
    data = loaded(BENCHMARKS / "rivals" / "shared.py").load(tmp_path)
    assert data.clients.flatten().tolist() == list(range(12))
    assert (len(data.x), len(data.held_x)) == (12, 5)
    known = {image.numpy().tobytes() for image in data.x}
    assert known.isdisjoint(image.numpy().tobytes() for image in data.held_x)


@pytest.mark.recipe
def test_a_tiny_run_times_fedpress_beside_the_plain_loops(tmp_path, simulation):
    log = tmp_path / "log.jsonl"
    only = ("fedpress/local/float32", "plain/processes/bf16", "central/threads/float32")
    sizes = ("--tiny", "--rounds", "2", "--repeats", "1", "--threads", "1", "--log", str(log))
    ended = run(*sizes, "--only", *only)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert [found["arm"] for found in records] == list(only)
    for found in records:
        assert len(found["rounds"]) == 2
        assert min(found["rounds"]) > 0
        assert 0 <= found["accuracy"] <= 1
    assert simulation.table(records) in ended.stdout
    assert run("--table", str(log)).stdout == ended.stdout
