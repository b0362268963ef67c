"""How long channel pruning takes, from a model to a smaller one: trace, L1 score, plan and removal.

    OMP_NUM_THREADS=1 python benchmarks/pruning_speed.py [--repeats 5]

ResNet-18 for 32x32 images and a bottleneck ResNet-50 for 224x224, cut to half of their parameters, beside
torch-pruning (graph, L1 score, removal at one ratio) in the same process, turn by turn. One thread.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from statistics import median
from time import perf_counter, process_time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress import compress
from fedpress.models.resnet import resnet18


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut (He et al. 2016, with the stride in the 3x3)."""

    def __init__(self, i: int, width: int, stride: int) -> None:
        super().__init__()
        o = 4 * width
        self.a, self.na = nn.Conv2d(i, width, 1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.c, self.nc = nn.Conv2d(width, o, 1, bias=False), nn.BatchNorm2d(o)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or i != o:
            self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, i, H, W] to [n, 4 * width, H / stride, W / stride]."""
        y = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        return F.relu(self.nc(self.c(y)) + self.short(x))


def resnet50() -> nn.Module:
    """ResNet-50 for 1000 classes: 25,557,032 parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    i = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(Bottleneck(i, 64 << stage, 2 if stage and not block else 1))
            i = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 1000))


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the seconds of each part."""
    at = [perf_counter()]
    graph = compress.trace(model, x)
    at.append(perf_counter())
    scores = compress.score(model, graph, "l1")
    at.append(perf_counter())
    plan = compress.plan(model, graph, scores, keep_params=0.5)
    at.append(perf_counter())
    compress.remove_(model, plan)
    at.append(perf_counter())
    return dict(
        zip(("trace", "score", "plan", "remove"), (b - a for a, b in pairwise(at)), strict=True)
    )


def theirs(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the seconds of torch-pruning."""
    import torch_pruning as tp

    start = perf_counter()
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    score = tp.importance.MagnitudeImportance(p=1)
    pruner = tp.pruner.MagnitudePruner(
        model, x, importance=score, pruning_ratio=0.3, ignored_layers=head, round_to=8
    )
    pruner.step()
    return {"all": perf_counter() - start}


def timed(
    run: Callable[[nn.Module, Tensor], dict[str, float]], model: nn.Module, x: Tensor
) -> dict[str, float]:
    """Runs on a copy; returns the seconds of the parts, their sum, and those of the processor."""
    copy, start = deepcopy(model).eval(), process_time()
    parts = run(copy, x)
    return {**parts, "wall": sum(parts.values()), "cpu": process_time() - start}


def main() -> None:
    """Prints the median seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    networks = {
        "resnet18": (resnet18(), torch.zeros(2, 3, 32, 32)),
        "resnet50": (resnet50(), torch.zeros(2, 3, 224, 224)),
    }
    once = timed(ours, nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2)), torch.zeros(2, 2))
    print(
        f"once for each process torch.export is imported: wall {once['wall']:.2f} cpu {once['cpu']:.2f} s"
    )
    for name, (model, x) in networks.items():
        rows: dict[str, list[dict[str, float]]] = {"fedpress": [], "torch-pruning": []}
        for _ in range(repeats):
            rows["fedpress"].append(timed(ours, model, x))
            rows["torch-pruning"].append(timed(theirs, model, x))
        for who, runs in rows.items():
            medians = {key: median(run[key] for run in runs) for key in runs[0]}
            print(
                f"{name:9} {who:14}",
                " ".join(f"{key} {value:.2f}" for key, value in medians.items()),
                "s",
            )


if __name__ == "__main__":
    main()
