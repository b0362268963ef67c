"""Seconds a round of the engines `local`, `processes` and `ray`, each with two workers at most.

    python benchmarks/engines.py --rounds 10 --repeats 2

Two recipes on digits with 10 clients: a small CNN, and a network of 1.6 million parameters. The engines take turns, and
all end in the same bits, which is checked. Printed: median, smallest and largest round, without the first of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from fedpress.deploy.processor import this_processor

RECIPE = """
name = "engines"
[data]
source = "digits"
num_clients = 10
public_share = 0.1
validation = 100
[model]
{model}
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 20
"""
MODELS = {
    "small CNN": 'architecture = "cnn"\narguments = { in_channels = 1, image_size = 8 }',
    "1.6 M parameters": 'architecture = "mlp"\narguments = { in_features = 64, hidden = [1230, 1230] }',
}
ENGINES = {
    "local": ["--engine", "local"],
    "processes": ["--engine", "processes", "--workers", "2"],
    "ray": ["--engine", "ray", "--actors", "2"],
}


def rounds(model: str, words: list[str], number: int, folder: Path) -> tuple[list[float], bytes]:
    """Runs the recipe with an engine; returns the seconds of each round, and the model's file."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(model=model, rounds=number))
    command = [sys.executable, "-m", "fedpress", "run", "recipe.toml", *words, "--out", "run"]
    # One thread, as each worker has.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    lines = (folder / "run" / "records.jsonl").read_text().splitlines()
    found = [one["seconds"] for one in map(json.loads, lines) if "round" in one]
    return found, (folder / "run/stages/0-federate/model.safetensors").read_bytes()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    chosen = parser.parse_args()
    print(this_processor().name, f"{os.cpu_count()} cores", flush=True)
    for name in chosen.models:
        seconds: dict[str, list[float]] = {engine: [] for engine in chosen.engines}
        ends = set()
        with tempfile.TemporaryDirectory() as place:
            for repeat in range(chosen.repeats):
                for engine in chosen.engines:
                    folder = Path(place) / f"{engine}{repeat}"
                    found, end = rounds(MODELS[name], ENGINES[engine], chosen.rounds, folder)
                    seconds[engine] += found[1:]
                    ends.add(end)
        for engine, all_rounds in seconds.items():
            middle = statistics.median(all_rounds)
            print(
                f"{name}, {engine}: {middle:.3f} s a round "
                f"({min(all_rounds):.3f} to {max(all_rounds):.3f}, {len(all_rounds)} rounds)",
                flush=True,
            )
        print(f"{name}: {'the same bits' if len(ends) == 1 else 'OTHER BITS'}", flush=True)


if __name__ == "__main__":
    main()
