"""Latency and file size of ResNet-18, dense and pruned to 30%, float32 and int8, in every runtime that is installed.

All files are run in turn, again and again, so that what else the machine does hits all alike; each repeat gives one
ratio to dense float32 in the same runtime and one to dense float32 in eager torch. Shown are median and quartiles over
the repeats, by wall time and by processor time (one thread; leaves out what other processes took). Latency does not
depend on the weights, so the dense network is untrained. With --data the pruned files' accuracy on the CIFAR-10 test
images is measured too, and their ranges are taken from training images in place of noise.

    python benchmarks/latency.py [--batch 1] [--repeats 15] [--seconds 0.5] [--models FOLDER_OR_FILE ...]
        [--data DIR [--images 10000]] [--json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedpress import data, deploy, storage
from fedpress.core.examples import Arrays
from fedpress.data import DataSettings
from fedpress.deploy import FORMATS, Job, Runnable, file_bytes
from fedpress.deploy.processor import as_json, settings, this_processor
from fedpress.models import load_model
from fedpress.models.resnet import resnet18
from fedpress.pipeline.environment import machine
from fedpress.tasks import Task

HERE = Path(__file__).parent
SHAPE = (3, 32, 32)
KINDS = {"float32": None, "int8": 8, "int8 (7-bit weights)": 7}
ADD_IN_16_BITS = (
    "onnx",
)  # whose kernels for AVX2 do so: seven bits are for it; OpenVINO gets them anyway
Row = dict[str, Any]


def subjects(
    batches: tuple[torch.Tensor, ...], folder: Path, more: list[Path]
) -> dict[str, Runnable]:
    """Exports both networks, and the saved models `more`, every way; names are `format, network, kind`."""
    torch.manual_seed(0)
    networks = {"dense": resnet18(), "pruned": load_model(HERE / "checkpoints" / "cifar10-cpu")[1]}
    networks |= {path.name.partition(".")[0]: storage.load(path)[1] for path in more}
    found: dict[str, Runnable] = {
        f"torch, {name}, float32": model.eval() for name, model in networks.items()
    }
    for format, row in FORMATS.items():
        if command := row.missing():
            print(f"{format}: left out; {command}")
            continue
        for network, model in networks.items():
            for kind, bits in KINDS.items():
                if bits == 7 and format not in ADD_IN_16_BITS:
                    continue
                job = Job(SHAPE, batches=batches if bits else (), weight_bits=bits or 8)
                path = folder / f"{network}-{bits}{row.suffix}"
                found[f"{format}, {network}, {kind}"] = deploy.export(model, path, format, job).path
    return found


def ratios(times: list[dict[str, float]], name: str, base: str) -> list[float]:
    """Returns median and quartiles of how many times as fast `name` is as `base`."""
    return np.percentile([t[base] / t[name] for t in times], [50, 25, 75]).round(2).tolist()


def measured(found: dict[str, Runnable], args: argparse.Namespace) -> list[Row]:
    """Runs everything in turn and returns one row for each."""
    wall: list[dict[str, float]] = []
    cpu: list[dict[str, float]] = []
    for _ in range(args.repeats):
        times = deploy.time_in_turn(
            found, SHAPE, batches=[args.batch], threads=[1], seconds=args.seconds / len(found)
        )
        wall.append({name: t.median_ms for name, (t,) in times.items()})
        cpu.append({name: t.cpu_ms for name, (t,) in times.items()})
    rows = []
    for name, subject in found.items():
        format = name.split(",")[0]
        own, eager = f"{format}, dense, float32", "torch, dense, float32"
        rows.append(
            {
                "name": name,
                "ms": float(np.median([t[name] for t in wall])),
                "cpu_ms": np.percentile([t[name] for t in cpu], [50, 25, 75]).round(3).tolist(),
                "same_runtime": ratios(wall, name, own),
                "same_runtime_cpu": ratios(cpu, name, own),
                "eager_cpu": ratios(cpu, name, eager),
                "bytes": None if isinstance(subject, nn.Module) else file_bytes(subject),
            }
        )
    return rows


def with_accuracy(
    rows: list[Row], found: dict[str, Runnable], test: Arrays, preprocess: Any, task: Task
) -> None:
    """Adds the accuracy of the files of trained networks."""
    for row in rows:
        subject = found[row["name"]]
        if ", dense," not in row["name"] and not isinstance(subject, nn.Module):
            row["accuracy"] = deploy.metrics(subject, test, preprocess, task)["accuracy"]


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="for all files together, in one repeat"
    )
    parser.add_argument(
        "--models", type=Path, nargs="+", default=[], help="saved models of this input to add"
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument(
        "--images",
        type=int,
        default=10_000,
        help="how many test images the accuracy is taken on; 0: none",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    batches: tuple[torch.Tensor, ...] = (torch.randn(32, *SHAPE),)
    images = None
    if args.data:
        images = data.load(
            DataSettings(source="cifar10", path=args.data, num_clients=1, examples_per_client=10), 0
        )
        batches = images.preprocess(images.public.x[:256]).split(64)
    with tempfile.TemporaryDirectory() as folder:
        found = subjects(batches, Path(folder), args.models)
        rows = measured(found, args)
        if images and args.images:
            with_accuracy(
                rows,
                found,
                images.test.take(torch.arange(args.images)),
                images.preprocess,
                images.task,
            )
    if args.json:
        here = as_json(this_processor())
        print(json.dumps({"machine": machine(), "processor": here, "rows": rows}, indent=1))
        return
    here = this_processor()
    print(f"{here.name} with {', '.join(here.features)}")
    for runtime in sorted({row.runtime for row in FORMATS.values()}):
        print(f"{runtime}: {settings(runtime, wide=True) or 'no options'} for 8-bit weights")
    print(
        f"{machine()}; batch {args.batch}, one thread, median of {args.repeats} repeats (quartiles)"
    )
    if images and args.images:
        print(f"accuracy on the first {args.images} test images")
    for row in rows:
        size = f"{row['bytes'] / 1e6:7.3f} MB" if row["bytes"] else " " * 10
        says = [
            f"{label} {row[key][0]:6.2f}x ({row[key][1]:.2f}-{row[key][2]:.2f})"
            for label, key in (
                ("same runtime: wall", "same_runtime"),
                ("cpu", "same_runtime_cpu"),
                ("eager: cpu", "eager_cpu"),
            )
        ]
        share = f"  accuracy {100 * row['accuracy']:.2f}%" if "accuracy" in row else ""
        cpu = "{:7.2f} ({:.2f}-{:.2f})".format(*row["cpu_ms"])
        print(f"{row['name']:42} {row['ms']:7.2f} ms  cpu {cpu}  {size}  {'  '.join(says)}{share}")


if __name__ == "__main__":
    main()
