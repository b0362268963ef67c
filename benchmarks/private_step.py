"""Time of one private training step (per-sample clipping and noise) against one plain step of the same batch.

The network is a ResNet-18 with 30% of its parameters (widths 32/72/144/280, frozen batch norm) on 32x32 images.
Plain and private steps alternate, and the median of their ratios is reported, so that a busy machine hurts both.

    python benchmarks/private_step.py [--batch 64] [--threads 2] [--repeats 9] [--clock wall] [--json]

`--clock cpu --threads 1` counts processor seconds, which a busy machine does not stretch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from fedpress.models.norms import freeze_batch_norm_
from fedpress.models.resnet import ResNet
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan

Row = dict[str, str | float | int]
CPU = torch.device("cpu")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def network() -> nn.Module:
    """Returns the pruned ResNet-18 with frozen batch norm: 3.4 million parameters."""
    model = freeze_batch_norm_(ResNet(widths=(32, 72, 144, 280), blocks=2, num_classes=10))
    return model.to(memory_format=torch.channels_last)


def measure(
    *,
    batch: int = 64,
    repeats: int = 9,
    autocast: torch.dtype | None = None,
    method: str | None = "ghost",
    clock: str = "wall",
    device: torch.device = CPU,
) -> Row:
    """Returns the median seconds of both steps at one precision, the median of their ratios and its quartiles."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32).to(device, memory_format=torch.channels_last)
    y = torch.randint(10, (batch,)).to(device)
    # sampling_prob 1 keeps the batch at its size, so that both steps see the same images
    plan = PrivacyPlan("sample", clip_norm=1.0, sampling_prob=1.0, noise_multiplier=1.0)
    private = private_steps(
        network().to(device),
        F.cross_entropy,
        x,
        y,
        plan=plan,
        steps=repeats + 2,
        lr=1e-4,
        generator=torch.Generator().manual_seed(0),
        method=method,  # type: ignore[arg-type]
        autocast=autocast,
    )
    plain = plain_steps(network().to(device), x, y, autocast=autocast)
    both = (lambda: next(plain)), (lambda: next(private))
    pairs = [
        tuple(seconds(step, CLOCKS[clock], device) for step in both) for _ in range(repeats + 2)
    ][2:]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "precision": str(autocast or torch.float32).removeprefix("torch."),
        "method": method or "chosen",
        "batch": batch,
        "threads": torch.get_num_threads(),
        "clock": clock,
        "plain_s": statistics.median(a for a, _ in pairs),
        "private_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
    }


def plain_steps(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, autocast: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yields the loss after each step of plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    while True:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        yield loss.detach()


def seconds(
    work: Callable[[], object], clock: Callable[[], float], device: torch.device = CPU
) -> float:
    """Returns the seconds that `work` takes by `clock`, with what it has queued on the device."""
    wait_for(device)
    start = clock()
    work()
    wait_for(device)
    return clock() - start


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has computed all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Prints one line per precision and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for autocast, method in ((None, "ghost"), (torch.bfloat16, "ghost"), (None, "loop")):
        row = measure(
            batch=chosen.batch,
            repeats=chosen.repeats,
            autocast=autocast,
            method=method,
            clock=chosen.clock,
        )
        if chosen.json:
            print(json.dumps(row), flush=True)
        else:
            times = "plain {plain_s:.3f} s, private {private_s:.3f} s".format(**row)
            print(
                "{precision:9} {method:6}".format(**row),
                times,
                "ratio {ratio:.2f} ({ratio_low:.2f} to {ratio_high:.2f})".format(**row),
                flush=True,
            )


if __name__ == "__main__":
    main()
