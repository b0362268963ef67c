"""One local SGD step of a small CNN with group norm: an ExecuTorch program against eager torch, one thread.

Both take the same batch in turn; shown are median and quartiles of the ratio of processor times, and the file's size.

    python benchmarks/ondevice.py [--batch 8] [--repeats 200]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import thread_time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.deploy import DeviceModel, export_training
from fedpress.pipeline.environment import machine

SHAPE = (3, 32, 32)


def network() -> nn.Module:
    """Makes three convolutions with group norm, and a linear layer: 24,458 parameters."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        blocks += [
            nn.Conv2d(before, after, 3, padding=1),
            nn.GroupNorm(4, after),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def seconds(run: Callable[[], None]) -> float:
    """Returns the processor time of one run."""
    start = thread_time()
    run()
    return thread_time() - start


def main() -> None:
    """Measures and prints two lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, chance = network(), torch.Generator().manual_seed(0)
    x = torch.randn(args.batch, *SHAPE, generator=chance)
    y = torch.randint(0, 10, (args.batch,), generator=chance)
    with tempfile.TemporaryDirectory() as folder:
        made = export_training(
            model, Path(folder) / "train.pte", input_shape=SHAPE, batch_size=args.batch
        )
        device = DeviceModel(made.path)
    theirs, ours = torch.optim.SGD(model.parameters(), 0.01), device.optimizer(0.01)

    def eager() -> None:
        theirs.zero_grad()
        F.cross_entropy(model(x), y).backward()
        theirs.step()

    def program() -> None:
        ours.step(device.mean_gradient(x, y)[1])

    times = (
        np.array([(seconds(eager), seconds(program)) for _ in range(args.repeats)])[
            args.repeats // 10 :
        ]
        * 1e3
    )
    ratio = np.percentile(times[:, 1] / times[:, 0], [50, 25, 75])
    far = max(
        (p.detach() - q.detach()).abs().max().item()
        for p, q in zip(model.parameters(), device.parameters(), strict=True)
    )
    print(f"{machine()}; batch {args.batch}; torch {np.median(times[:, 0]):.2f} ms, ExecuTorch "
          f"{np.median(times[:, 1]):.2f} ms; {ratio[0]:.2f} ({ratio[1]:.2f}-{ratio[2]:.2f}) times as long")  # fmt: skip
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, file {made.file_bytes:,} bytes; parameters differ by {far:.1g} after {args.repeats}"
    )


if __name__ == "__main__":
    main()
