"""Bytes to an accuracy: dense float32 FedAvg against coded updates both ways, on the same clients and seeds.

    python benchmarks/federated_bytes.py --data DIR --out DIR cnn --seeds 0 1 2
    python benchmarks/federated_bytes.py --data DIR --out DIR resnet --seeds 0 1 2

`cnn` trains a small network from scratch on 100 clients of Dirichlet(0.3) labels; `resnet` goes on from the pruned
ResNet-18 of benchmarks/checkpoints/cifar10-cpu with 10 clients. Every arm is a recipe; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.reports.html import write_report
from fedpress.workspace.folder import RunFolder
from fedpress.workspace.state import StageFinished, Tick

HERE = Path(__file__).parent

CNN = """
name = "cnn"
[data]
source = "cifar10"
num_clients = 100
examples_per_client = 200
partition = {{ kind = "dirichlet", alpha = 0.3 }}
validation = 2000
[model]
architecture = "small_cnn:SmallCNN"
[[stage]]
kind = "federate"
num_rounds = {rounds}
cohort = 10
epochs = 2
batch_size = 20
lr = 0.1
lr_decay = 0.98
augment = {{ flip = "random" }}
"""

RESNET = """
name = "resnet"
[data]
source = "cifar10"
num_clients = 10
examples_per_client = 200
partition = {{ kind = "iid" }}
validation = 500
[model]
checkpoint = "{checkpoint}"
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 50
lr = 0.005
augment = {{ flip = "random" }}
"""

CODED = {
    "cnn": [
        'stage.0.uplink=[{ kind = "quantize", rate = 0.47, unbiased = true }]',
        'stage.0.downlink=[{ kind = "quantize", rate = 0.95 }]',
        'stage.0.first_downlink=[{ kind = "quantize", rate = 2.5 }]',
    ],
    "resnet": [
        'stage.0.uplink=[{ kind = "quantize", rate = 0.4 }]',
        'stage.0.downlink=[{ kind = "quantize", rate = 0.4 }]',
        'stage.0.first_downlink=[{ kind = "quantize", rate = 5.0 }]',
        "stage.0.error_feedback=true",
    ],
}
TEXTS = {"cnn": (CNN, 150), "resnet": (RESNET, 4)}


def run_arm(task: str, arm: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Runs one arm, or takes up a finished one, and returns its records of rounds."""
    template, rounds = TEXTS[task]
    text = template.format(
        rounds=args.rounds or rounds, checkpoint=HERE / "checkpoints" / "cifar10-cpu"
    )
    overrides = [f"seed={seed}", f"data.path={json.dumps(str(args.data))}"]
    overrides += CODED[task] if arm == "coded" else []
    recipe = recipes.load(text, overrides + args.override)
    path, settings = Path(args.out) / f"{task}-{arm}-{seed}", settings_of(recipe)
    folder = (
        RunFolder.resume(path, settings)
        if path.exists()
        else RunFolder.create(path, text, settings)
    )
    for event in runs.execute(recipe, folder, load_data(recipe)):
        if isinstance(event, Tick):
            print(f"{path.name}: {event.note}", file=sys.stderr, flush=True)
        elif isinstance(event, StageFinished):
            print(
                f"{path.name}: test accuracy {event.result['accuracy']:.4f}",
                file=sys.stderr,
                flush=True,
            )
    write_report(path)
    lines = (json.loads(line) for line in folder.records.path.read_text("utf-8").splitlines())
    result = json.loads((path / "result.json").read_text("utf-8"))["stages"][-1]
    records = [line for line in lines if line["kind"] == "federate"]
    return [*records, {"final": result["accuracy"], "up": result["bytes_up"], "down": result["bytes_down"],
                       "values": result["trained_values"], "refused": sum(len(r["refused"]) for r in records),
                       "updates": sum(len(r["clients"]) for r in records)}]  # fmt: skip


def bytes_to(records: list[dict[str, float]], target: float) -> float | None:
    """Returns the bytes, both ways, after the first round whose validation accuracy, of three rounds, is `target`."""
    spent, last = 0.0, []
    for record in records[:-1]:
        spent += record["bytes_up"] + record["bytes_down"]
        last = [*last[-2:], record["accuracy"]]
        if len(last) == 3 and statistics.mean(last) >= target:
            return spent
    return None


def main() -> None:
    """Runs both arms for every seed and prints what they came to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TEXTS)
    parser.add_argument("--data", required=True, type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--arms", nargs="+", choices=["dense", "coded"], help="run only these, and print nothing"
    )
    parser.add_argument(
        "--override", action="append", default=[], help="KEY=VALUE of the recipe, for both arms"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    rows = []
    for seed in args.seeds:
        if args.arms:
            for arm in args.arms:
                run_arm(args.task, arm, seed, args)
            continue
        dense, coded = (run_arm(args.task, arm, seed, args) for arm in ("dense", "coded"))
        target = 0.9 * max(r["accuracy"] for r in dense[:-1])
        rows.append({
            "seed": seed,
            "accuracy": [dense[-1]["final"], coded[-1]["final"]],
            "bits_up": [8 * a[-1]["up"] / a[-1]["updates"] / a[-1]["values"] for a in (dense, coded)],
            "bytes": [a[-1]["up"] + a[-1]["down"] for a in (dense, coded)],
            "target": target,
            "bytes_to_target": [bytes_to(dense, target), bytes_to(coded, target)],
            "refused": [dense[-1]["refused"], coded[-1]["refused"]],
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    if not rows:
        return
    lost = [100 * (r["accuracy"][0] - r["accuracy"][1]) for r in rows]
    ratio = [r["bytes"][0] / r["bytes"][1] for r in rows]
    print(f"points lost: mean {statistics.mean(lost):.2f}, from {min(lost):.2f} to {max(lost):.2f}")
    print(f"times fewer bytes: {min(ratio):.1f} to {max(ratio):.1f}")


if __name__ == "__main__":
    main()
