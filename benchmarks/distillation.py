"""What a dense teacher gives back to a pruned network: `teacher = "dense"` against none, at equal epochs.

    PYTHONPATH=benchmarks python benchmarks/distillation.py --data DIR --out DIR --seeds 0 1 2

A resnet-small of width 16 (78,042 parameters) learns 2,000 images of CIFAR-10, halved to 16x16 so that one thread does
a seed in minutes; Taylor scores cut it to a share of its parameters, and it is fine-tuned with the teacher or without:
the same recipe but for one key. Whole runs, resumable: a run that is there is not repeated. Accuracy on 10,000 images.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import torch

from fedpress import data
from fedpress.core.examples import Arrays, Preprocess, resized
from fedpress.data import DataSettings, FederatedData
from fedpress.pipeline import recipe
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder

RECIPE = """
[data]
source = "distillation:halved"
[model]
architecture = "resnet-small"
arguments = { width = 16 }
[[stage]]
kind = "train"
name = "dense"
epochs = 60
batch_size = 64
lr = 0.1
augment = { flip = "random" }
[[stage]]
kind = "prune"
keep_params = 0.3
score = "taylor"
round_to = 1
min_keep = 0.02
[[stage]]
kind = "train"
name = "tune"
epochs = 40
batch_size = 64
lr = 0.05
augment = { flip = "random" }
"""
ARMS: dict[str, tuple[str, ...]] = {
    "labels": (),
    "teacher": ("stage.tune.teacher=dense",),
    "attention": (
        "stage.tune.teacher=dense",
        'stage.tune.distill.attention=["stages.0", "stages.1", "stages.2"]',
    ),
    "features": ("stage.tune.teacher=dense", 'stage.tune.distill.features=["stages.2"]'),
}


def halved(path: Path) -> FederatedData:
    """Returns CIFAR-10 at 16x16 pixels: 2,000 public images, no validation set, all test images."""
    whole = data.load(
        DataSettings(
            source="cifar10", path=path, num_clients=1, examples_per_client=1, validation=0
        ),
        0,
    )
    public = whole.public.take(torch.arange(2_000))
    parts = {
        part: Arrays(resized(a.x, 16), a.y)
        for part, a in [("public", public), ("test", whole.test)]
    }
    client = {name: Arrays(resized(a.x, 16), a.y) for name, a in whole.clients.items()}
    validation = Arrays(parts["public"].x[:0], parts["public"].y[:0])
    return dataclasses.replace(
        whole,
        clients=client,
        validation=validation,
        preprocess=Preprocess.fit(parts["public"].x),
        **parts,
    )


def measure(keep: float, arm: str, seed: int, path: Path, out: Path) -> tuple[float, float]:
    """Runs one arm, with the stages that it shares with others taken from them; returns the dense and its accuracy."""
    toml = recipe.load(
        RECIPE, (f"seed={seed}", f"data.path={path}", f"stage.prune.keep_params={keep}", *ARMS[arm])
    )
    place, shared = out / f"{seed}-{keep}-{arm}", out / f"{seed}-{keep}-labels"
    if not shared.exists():
        shared = next(iter(sorted(out.glob(f"{seed}-*-labels"))), shared)
    settings = settings_of(toml)
    folder = (
        RunFolder.resume(place, settings)
        if place.exists()
        else RunFolder.create(place, RECIPE, settings)
    )
    other = RunFolder.open(shared) if shared != place and shared.exists() else None
    for _ in runs.execute(toml, folder, load_data(toml), reuse=other):
        pass
    stages = json.loads((place / "result.json").read_text())["stages"]
    return stages[0]["accuracy"], stages[-1]["accuracy"]


def main() -> None:
    """Prints a line for each run and the table at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["labels", "teacher"])
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[float, str], list[float]] = {}
    dense = []
    for seed, keep, arm in itertools.product(a.seeds, a.keep, a.arms):
        before, after = measure(keep, arm, seed, a.data, a.out)
        dense.append(before)
        found.setdefault((keep, arm), []).append(after)
        print(f"seed {seed}  dense {before:.2%}  keep {keep:g}  {arm:9s} {after:.2%}", flush=True)
    print(f"\ndense {statistics.mean(dense):.2%}\n")
    print("| kept | arm | mean | spread | against labels |\n|---|---|---|---|---|")
    for (keep, arm), values in found.items():
        plain = found.get((keep, "labels"), values)
        gains = [100 * (v - p) for v, p in zip(values, plain, strict=True)]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {keep:.0%} | {arm} | {statistics.mean(values):.2%} | {spread:.2%} "
              f"| {statistics.mean(gains):+.2f} ({', '.join(f'{g:+.2f}' for g in gains)}) |")  # fmt: skip


if __name__ == "__main__":
    main()
