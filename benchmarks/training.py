"""Speed of a training step of ResNet-18 against a plain float32 loop, and of a private step against a plain one.

Both sides run in one process and take turns, and the median of the ratios of neighbours is reported with its spread,
so that whatever else the machine does hurts both. The plain loop is the one below: float32, NCHW, SGD.
The last line compares the arithmetic of a training step with the fastest matrix product of the same precision; with
`--clock cpu --threads 1` all times are processor seconds, which a busy machine does not stretch.

    python benchmarks/training.py [--batch 128] [--threads 2] [--repeats 7] [--clock wall] [--quick]
        [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import private_step
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedpress.core.examples import Arrays, Preprocess
from fedpress.models.resnet import resnet18
from fedpress.tasks import Classification
from fedpress.training.device import uses_bf16
from fedpress.training.fit import Fit
from fedpress.training.settings import TrainSettings

Row = dict[str, str | float | int]
WARM = (
    2  # steps before the clock counts: kernels are chosen and memory is fetched in the first ones
)
PREPROCESS = Preprocess((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
GOALS = {"training": ("at least", 1.8), "private": ("at most", 2.0)}


def examples(n: int) -> Arrays:
    """Returns `n` random byte images of 3x32x32 with labels."""
    chance = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=chance, dtype=torch.uint8)
    return Arrays(x, torch.randint(0, 10, (n,), generator=chance))


def plain_steps(data: Arrays, batch: int) -> Iterator[Tensor]:
    """Yields the loss after each step of a loop as one would write it down: float32, NCHW, SGD with momentum."""
    torch.manual_seed(0)
    model = resnet18().train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (PREPROCESS.mean, PREPROCESS.std))
    for index in torch.randperm(len(data)).split(batch):
        x = (data.x[index].float() / 255 - mean) / std
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), data.y[index])
        loss.backward()
        optimizer.step()
        yield loss.detach()


def matrix_peak(dtype: torch.dtype, *, repeats: int, clock: str, squares: Sequence[int]) -> float:
    """Returns the floating-point operations per second of the fastest square matrix product."""
    best = 0.0
    for side in squares:
        a, b = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
        torch.mm(a, b)
        took = min(
            private_step.seconds(lambda a=a, b=b: torch.mm(a, b), private_step.CLOCKS[clock])
            for _ in range(repeats)
        )
        best = max(best, 2 * side**3 / took)
    return best


def operations() -> int:
    """Returns the floating-point operations of products in a training step of ResNet-18, per image."""
    model = resnet18()
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.zeros(2).long()).backward()
    return counter.get_total_flops() // 2


def training_row(*, batch: int, repeats: int, clock: str = "wall", squares: Sequence[int]) -> Row:
    """Compares the steps of `Fit`, as a recipe runs them, with those of the plain loop."""
    data = examples(batch * (repeats + WARM))
    torch.manual_seed(0)
    fit = Fit(
        resnet18(),
        TrainSettings(epochs=1, batch_size=batch, lr=1e-3),
        task=Classification(()),
        seed=0,
    )
    ours, plain = fit.epochs(data, data.take(torch.arange(0)), PREPROCESS), plain_steps(data, batch)
    pairs = []
    for at in range(repeats + WARM):
        sides = [("plain", plain), ("ours", ours)]
        took = {
            name: private_step.seconds(lambda steps=steps: next(steps), private_step.CLOCKS[clock])
            for name, steps in (sides if at % 2 else sides[::-1])
        }
        pairs.append((took["plain"], took["ours"]))
    pairs = pairs[WARM:]
    ratios = sorted(a / b for a, b in pairs)
    dtype = torch.bfloat16 if uses_bf16(fit.model, "auto") else torch.float32
    peak = matrix_peak(dtype, repeats=repeats, clock=clock, squares=squares)
    speed = operations() * batch / statistics.median(b for _, b in pairs)
    return {
        "what": "training",
        "precision": str(dtype).removeprefix("torch."),
        "peak_flops": peak,
        "share_of_peak": speed / peak,
        "batch": batch,
        "pairs": repeats,
        "plain_images_per_s": batch / statistics.median(a for a, _ in pairs),
        "images_per_s": batch / statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


def private_row(*, batch: int, repeats: int, autocast: torch.dtype | None, clock: str) -> Row:
    """Compares a private step of the network of 30% with a plain step of it, at the same precision."""
    row = private_step.measure(batch=batch, repeats=repeats, autocast=autocast, clock=clock)
    speeds = {
        "plain_images_per_s": batch / float(row["plain_s"]),
        "images_per_s": batch / float(row["private_s"]),
    }
    ratio = {name: row[name] for name in ("ratio", "ratio_low", "ratio_high")}
    return {
        "what": "private",
        "precision": row["precision"],
        "batch": batch,
        "pairs": repeats,
        **speeds,
        **ratio,
    }


def machine() -> Row:
    """Says what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), ""
    )
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "unknown"
    return {
        "machine": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(about: Row, rows: list[Row]) -> str:
    """Lays the numbers out for a person."""
    lines = [
        "{machine}, {threads} threads of {cores} cores, load before {load_before}, torch {torch}".format(
            **about
        ),
        f"{'step':<19}{'batch':>6}{'plain':>12}{'fedpress':>12}   ratio (middle half of the pairs, their number)",
    ]
    for row in rows:
        word, goal = GOALS[str(row["what"])]
        meaning = "the speed" if row["what"] == "training" else "the time"
        lines.append(
            "{what:<10}{precision:<9}{batch:>6}{plain_images_per_s:>8.0f} im/s{images_per_s:>7.0f} im/s   "
            "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f}, {pairs})".format(**row)
            + f" times {meaning}; goal {word} {goal:g}"
        )
    lines += [
        "products of the training step: {share_of_peak:.0%} of the {precision} matrix peak, {0:.0f} GFLOP/s".format(
            float(row["peak_flops"]) / 1e9, **row
        )
        for row in rows
        if "peak_flops" in row
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=private_step.CLOCKS, default="wall")
    parser.add_argument(
        "--quick", action="store_true", help="batch 4 and one pair: only shows that it runs"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    batch, repeats = (4, 1) if chosen.quick else (chosen.batch, chosen.repeats)
    torch.set_num_threads(chosen.threads)
    about = machine()
    squares = (64,) if chosen.quick else (1024, 1536, 2048, 3072)
    rows = [training_row(batch=batch, repeats=repeats, clock=chosen.clock, squares=squares)]
    rows += [
        private_row(batch=batch, repeats=repeats, autocast=kind, clock=chosen.clock)
        for kind in (None, torch.bfloat16)
    ]
    print(json.dumps({**about, "rows": rows}, indent=1) if chosen.json else table(about, rows))


if __name__ == "__main__":
    main()
