"""How long channel pruning takes, from a model to a smaller one, beside torch-pruning.

    OMP_NUM_THREADS=1 python benchmarks/pruning_speed.py [--repeats 5] [--networks resnet50 vit]

What each side does, in one process, turn by turn, on one thread:

- fedpress: trace (capture the graph, apply the rules, cut a copy on trial and compare it), L1 score,
  plan for half of the parameters, removal; these are `cut`. Then `check_parity` on the result
  (evaluation and training mode, two batch sizes) is `check`.
- torch-pruning: graph from one forward and its backward graph, L1 score, removal at one ratio. It
  compares no outputs, so `cut` is the like of it, and `check` comes on top.

Networks: ResNet-18 for 32x32 images, a bottleneck ResNet-50 for 224x224; ViT-S/16, ConvNeXt-T and
MobileNetV2 for 224x224 of the transformers library, which torch-pruning is not asked for.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from statistics import median
from time import perf_counter

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


class Logits(nn.Module):
    """A model of the transformers library that gives a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Maps images [n, 3, 224, 224] to logits [n, classes]."""
        logits: Tensor = self.model(x).logits
        return logits


def vit() -> nn.Module:
    """ViT-S/16: 22 million parameters."""
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000
    )
    return Logits(transformers.ViTForImageClassification(config))


def convnext() -> nn.Module:
    """ConvNeXt-T: 29 million parameters."""
    import transformers

    return Logits(
        transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=1000))
    )


def mobilenet() -> nn.Module:
    """MobileNetV2: 3.5 million parameters."""
    import transformers

    return Logits(
        transformers.MobileNetV2ForImageClassification(
            transformers.MobileNetV2Config(num_labels=1000)
        )
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 32),
    "resnet50": (resnet50, 224),
    "vit": (vit, 224),
    "convnext": (convnext, 224),
    "mobilenet": (mobilenet, 224),
}
"""Name -> the network, and height and width of its images."""
ALSO_THEIRS = ("resnet18", "resnet50")
CUT = ("trace", "score", "plan", "remove")


def ours(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Returns the seconds of each part; layer norms may be cut, whose result is not exact."""
    dense = deepcopy(model)
    at = [perf_counter()]
    graph = compress.trace(model, x, approximate=("layer_norm",))
    at.append(perf_counter())
    scores = compress.score(model, graph, "l1")
    at.append(perf_counter())
    plan = compress.plan(model, graph, scores, keep_params=0.5)
    at.append(perf_counter())
    compress.remove_(model, plan)
    at.append(perf_counter())
    compress.check_parity(dense, model, plan, x)
    at.append(perf_counter())
    return dict(zip((*CUT, "check"), (b - a for a, b in pairwise(at)), strict=True))


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
    return {"cut": perf_counter() - start}


def timed(
    run: Callable[[nn.Module, Tensor], dict[str, float]], model: nn.Module, x: Tensor
) -> dict[str, float]:
    """Runs on a copy; returns the seconds of the parts, and of all parts of the cut."""
    parts = run(deepcopy(model).eval(), x)
    return {**parts, "cut": parts.get("cut") or sum(parts[part] for part in CUT)}


def shown(name: str, who: str, runs: list[dict[str, float]]) -> str:
    """Returns a line of median seconds."""
    medians = {key: median(run[key] for run in runs) for key in runs[0]}
    columns = " ".join(f"{key} {value:.2f}" for key, value in medians.items())
    return f"{name:9} {who:14} {columns} s"


def main() -> None:
    """Prints the median seconds, and the ratio of the cuts with the smallest and the largest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    once = timed(ours, nn.Sequential(nn.Linear(2, 64), nn.Linear(64, 2)), torch.randn(2, 2))
    print(f"once for each process torch.export is imported: {once['cut']:.2f} s")
    for name in chosen.networks:
        make, side = NETWORKS[name]
        model, x = make(), torch.randn(2, 3, side, side)
        fedpress, rival = [], []
        for _ in range(chosen.repeats):
            fedpress.append(timed(ours, model, x))
            if name in ALSO_THEIRS:
                rival.append(timed(theirs, model, x))
        print(shown(name, "fedpress", fedpress), flush=True)
        if rival:
            print(shown(name, "torch-pruning", rival))
            ratios = sorted(a["cut"] / b["cut"] for a, b in zip(fedpress, rival, strict=True))
            print(
                f"{name:9} cut / cut: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
