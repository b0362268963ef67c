"""The benchmark of one GPU: its tiny form on the CPU, and the images in less than 60 MB."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from fedpress.core.examples import Arrays
from fedpress.data import cifar10_parquet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = util.spec_from_file_location("benchmark_gpu", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.recipe
def test_a_tiny_run_on_the_cpu_fills_every_part_of_the_table(tmp_path):
    file = tmp_path / "rows.json"
    told = run("--tiny", "--device", "cpu", "--json", str(file))
    rows = json.loads(file.read_text("utf-8"))["rows"]
    for row in rows:
        assert f"| {row['part']} | {row['what']} | {row['value']} |" in told
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        "dense",
        "private",
        "clients",
        "export",
    ]
    whats = [row["what"] for row in rows]
    assert "accuracy after 2 epochs" in whats
    assert "bfloat16, batch 4" in whats
    engines = [what.rpartition(", ")[2] for what in whats if " clients, " in what]
    assert engines == ["local", "processes", "stacked"] * 2
    parity = next(row["value"] for row in rows if row["what"] == "parity")
    assert parity.startswith("100.0% of 12 images alike")


def test_the_networks_of_clients_have_the_sizes_in_their_names(gpu, monkeypatch):
    from fedpress.core import consent
    from fedpress.pipeline import recipe as recipes
    from fedpress.pipeline.start import first_state

    with consent.allowing([gpu.PFL.architecture, gpu.SMALL.architecture]):
        for network in (gpu.MLP, gpu.SMALL, gpu.PFL):
            text = gpu.RECIPE.format(
                architecture=network.architecture, arguments=network.arguments, rounds=1
            )
            state = first_state(recipes.load(text), gpu.client_data(network, 1))
            size = sum(p.numel() for p in state.model.parameters())
            assert f"{size:,} parameters" in network.name


def test_packed_images_are_read_as_cifar10(gpu, monkeypatch, tmp_path):
    chance = torch.Generator().manual_seed(0)
    # Smooth, as photographs are: noise would not survive any coder.
    rough = torch.rand(20, 3, 4, 4, generator=chance)
    smooth = torch.nn.functional.interpolate(rough, (32, 32), mode="bilinear")
    x = (255 * smooth).to(torch.uint8)
    parts = [Arrays(x[:12], torch.arange(12) % 10), Arrays(x[12:], torch.arange(8))]
    monkeypatch.setattr(gpu, "cifar10", lambda folder: parts)
    target = tmp_path / "small"
    assert gpu.pack(tmp_path, target) == sum(file.stat().st_size for file in target.iterdir())
    read = cifar10_parquet.read(cifar10_parquet.find(target), None)
    assert np.array_equal(read["test"][0], x[12:].numpy())
    assert read["train"][1].tolist() == (torch.arange(12) % 10).tolist()
    error = read["train"][0].astype(float) - x[:12].numpy()
    assert 0 < np.abs(error).mean() < 6
