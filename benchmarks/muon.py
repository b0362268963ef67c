"""Time of a step of Muon on the matrices of ResNet-18: torch's, in bfloat16, against fedpress's, in float32.

Processor time of one thread, so that other work on the machine counts little; the two take turns.

    python benchmarks/muon.py [--network dense|third] [--repeats 3]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from pruned_resnet import network
from torch import nn

from fedpress.models.resnet import resnet18
from fedpress.tasks import Classification
from fedpress.training.fit import Fit
from fedpress.training.optimizers import Muon
from fedpress.training.settings import TrainSettings


def main() -> None:
    """Measures and prints."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument(
        "--network",
        choices=["dense", "third"],
        default="third",
        help="of 11.17 or 3.36 M parameters",
    )
    words.add_argument("--repeats", type=int, default=3)
    chosen = words.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = resnet18() if chosen.network == "dense" else network()[1]
    matrices = [
        view
        for _, view in Fit(
            model, TrainSettings(epochs=1, optimizer="muon"), task=Classification(()), seed=0
        ).views
    ]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    sides: dict[str, torch.optim.Optimizer] = {
        "torch": torch.optim.Muon([nn.Parameter(m.detach().clone()) for m in matrices], 1e-3),
        "fedpress": Muon(matrices, 1e-3),
    }
    for twin, matrix in zip(sides["torch"].param_groups[0]["params"], matrices, strict=True):
        twin.grad = matrix.grad
    took: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(chosen.repeats + 1):
        for name, optimizer in sides.items():
            began = time.process_time()
            optimizer.step()
            if turn:  # the first warms up
                took[name].append(time.process_time() - began)
    ratios = sorted(a / b for a, b in zip(took["torch"], took["fedpress"], strict=True))
    fast = torch.cpu._is_avx512_bf16_supported()
    print(
        f"{chosen.network}: {len(matrices)} matrices, bfloat16 instructions: {'yes' if fast else 'no'}"
    )
    for name, seconds in took.items():
        print(f"{name:<10}{statistics.median(seconds):8.3f} s a step")
    print(
        f"torch takes {statistics.median(ratios):.1f} times as long ({ratios[0]:.1f}-{ratios[-1]:.1f})"
    )


if __name__ == "__main__":
    main()
