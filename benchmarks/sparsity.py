"""What sparse weights cost in accuracy: every schedule of sparsify, and l0, at equal epochs on the same data.

    python benchmarks/sparsity.py --out DIR --density 0.1 --seeds 0 1 2

Every arm is a recipe of stages over the digits and trains the same network for the same number of epochs altogether.
Each finished run is one line of OUT/sparsity.jsonl, and one that is there is not repeated; test accuracy is measured
once, at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder

HEAD = """
[data]
source = "digits"
num_clients = 2
examples_per_client = 20
validation = 100
[model]
architecture = "resnet-small"
arguments = { in_channels = 1, width = 8 }
"""
TRAIN = '[[stage]]\nkind = "train"\nbatch_size = 64\nlr = 0.1\n'
SPARSE = '[[stage]]\nkind = "sparsify"\nbatch_size = 64\nlr = 0.1\nevery = 10\n'
L0 = '[[stage]]\nkind = "l0"\nbatch_size = 64\nlr = 0.1\n'


def arms(density: float, epochs: int) -> dict[str, str]:
    """Returns the stages of each arm; all train for `epochs` in sum."""
    half, third = epochs // 2, epochs // 3
    keep = f"density = {density}\n"
    return {
        "dense": f"{TRAIN}epochs = {epochs}\n",
        "random, from the start": f"{SPARSE}{keep}epochs = {epochs}\nscore = 'random'\nscope = 'erk'\n",
        "SNIP, from the start": f"{SPARSE}{keep}epochs = {epochs}\nscore = 'snip'\n",
        "uniform, one-shot": f"{TRAIN}epochs = {half}\n{SPARSE}{keep}epochs = {epochs - half}\nscope = 'uniform'\n",
        "random, one-shot": f"{TRAIN}epochs = {half}\n{SPARSE}{keep}epochs = {epochs - half}\nscore = 'random'\n",
        "sensitivity, one-shot": f"{TRAIN}epochs = {half}\n{SPARSE}{keep}epochs = {epochs - half}\n"
        "scope = 'sensitivity'\n",
        "RigL": f"{SPARSE}{keep}epochs = {epochs}\nschedule = 'rigl'\nscore = 'random'\nscope = 'erk'\n",
        "magnitude, one-shot": f"{TRAIN}epochs = {half}\n{SPARSE}{keep}epochs = {epochs - half}\n",
        "LAMP, one-shot": f"{TRAIN}epochs = {half}\n{SPARSE}{keep}epochs = {epochs - half}\nscore = 'lamp'\n",
        "magnitude, gradual": f"{SPARSE}{keep}epochs = {epochs}\nschedule = 'gradual'\n",
        "magnitude, rewind": f"{SPARSE}{keep}epochs = {third}\nschedule = 'rewind'\nrounds = 2\nrewind_to = 1\n",
        "L0 gates, then none": f"{L0}{keep}epochs = {epochs - third}\n{TRAIN}epochs = {third}\n",
    }


def measure(stages: str, seed: int) -> dict[str, float]:
    """Runs an arm in a folder of its own; returns accuracy, the kept share of the sparse weights, and seconds."""
    began = time.process_time()
    recipe = recipes.load(HEAD + stages, [f"seed={seed}"])
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", HEAD + stages, settings_of(recipe))
        for _ in runs.execute(recipe, folder, load_data(recipe)):
            pass
        result = json.loads((folder.path / "result.json").read_text())
    density = next((line["density"] for line in result["stages"] if "density" in line), 1.0)
    return {
        "accuracy": result["final"]["accuracy"],
        "density": density,
        "seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="only those whose name holds one of these words")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "sparsity.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    chosen = arms(given.density, given.epochs)
    if given.arms:
        chosen = {
            arm: stages for arm, stages in chosen.items() if any(word in arm for word in given.arms)
        }
    for seed in given.seeds:
        for arm, stages in chosen.items():
            key = {"arm": arm, "wanted": given.density, "epochs": given.epochs, "seed": seed}
            if not any(key.items() <= line.items() for line in lines):
                lines.append({**key, **measure(stages, seed)})
                with path.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print(
        f"| {100 * (1 - given.density):g}% zeros, {given.epochs} epochs | test accuracy, mean ± deviation | kept |"
    )
    print("| --- | --- | --- |")
    for arm in chosen:
        found = [
            x
            for x in lines
            if (x["arm"], x["wanted"], x["epochs"]) == (arm, given.density, given.epochs)
        ]
        accuracy = [100 * line["accuracy"] for line in found]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        print(
            f"| {arm} | {statistics.mean(accuracy):.2f} ± {spread:.2f} | {100 * found[0]['density']:.2f}% |"
        )


if __name__ == "__main__":
    main()
