"""How long uneven clients take to learn digits under each schedule, in simulated seconds.

    python benchmarks/schedules.py --seeds 0 1 2

40 clients of 25 examples each; a task takes 10 s on the median device, and devices differ by `--devices`, the standard
deviation of the logarithm. At most 20 clients work at the same time in every arm. Printed for each arm, as mean and
spread over the seeds: simulated minutes until the validation accuracy is first at the target, server steps and MB sent
up to then, and the mean staleness of an update.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder

ARMS = {
    "rounds of 20": "cohort = 20",
    "rounds of 20, deadline 30 s": 'cohort = 20\nschedule = { kind = "synchronous", deadline = 30.0 }',
    "rounds of the first 15 of 20": 'cohort = 15\nschedule = { kind = "synchronous", over_selection = 1.33 }',
    "buffer of 10, 20 at work": 'schedule = { kind = "buffered", buffer = 10, concurrency = 20 }',
    "buffer of 5, 20 at work": 'schedule = { kind = "buffered", buffer = 5, concurrency = 20 }',
}
RECIPE = """
name = "schedules"
seed = {seed}
[data]
source = "digits"
num_clients = 40
examples_per_client = 25
validation = 300
[data.partition]
kind = "dirichlet"
alpha = 0.5
[model]
architecture = "mlp"
arguments = {{ in_features = 64, hidden = [64] }}
[[stage]]
kind = "federate"
num_rounds = {steps}
target_accuracy = {target}
weights = "equal"
batch_size = 8
lr = 0.1
delays = {{ kind = "lognormal", median = 10.0, devices = {devices}, tasks = 0.2 }}
{arm}
"""


def run(arm: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Runs one arm until the target; returns minutes, steps, MB and staleness."""
    text = RECIPE.format(
        arm=ARMS[arm],
        seed=seed,
        steps=options.steps,
        target=options.target,
        devices=options.devices,
    )
    loaded = recipes.load(text, ())
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(Path(place) / "run", text, settings_of(loaded))
        for _ in runs.execute(loaded, folder, load_data(loaded)):
            pass
        lines = (Path(place) / "run" / "records.jsonl").read_text().splitlines()
    return told([json.loads(line) for line in lines], options.target)


def told(records: list[dict[str, Any]], target: float) -> dict[str, float]:
    """Sums up the records of a run that stopped at the target."""
    last = records[-1]
    if last["accuracy"] < target:
        raise SystemExit(f"{last['accuracy']:.3f} after {len(records)} steps: give more --steps")
    stale = [s for line in records for s in line.get("staleness", [0])]
    return {
        "minutes": last["simulated_seconds"] / 60,
        "steps": float(len(records)),
        "MB up": sum(line["bytes_up"] for line in records) / 1e6,
        "staleness": statistics.fmean(stale),
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--devices", type=float, default=1.0)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    print("| schedule | minutes | steps | MB up | staleness |\n| --- | --- | --- | --- | --- |")
    for arm in ARMS:
        found = [run(arm, seed, options) for seed in options.seeds]
        cells = []
        for name in found[0]:
            values = [one[name] for one in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.3g} ± {spread:.2g}")
        print(f"| {arm} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
