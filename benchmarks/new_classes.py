"""What a federation is worth where only the clients know some classes, by epsilon and trust.

    fedpress run cifar10-new-classes --out runs/new
    python benchmarks/new_classes.py runs/new --data DIR --out DIR --choose
    python benchmarks/new_classes.py runs/new --data DIR --out DIR --seeds 0 1 2

In the recipe `cifar10-new-classes` the public images show no cat and no truck. The run gives the
network before its federation, whose features of all images are computed once. From then on only
the head learns, by the clients' own steps or by joint noised steps, so that an arm takes seconds:
the numbers are those of a federate stage with `trainable = ["head.*"]`. The seeds are those of the
federation: its batches and its noise. Which images are whose, and the network before, are the run's.

Features are centred and scaled with the public ones, which is folded into the head, so that one
clip norm fits all. Learning rates were chosen on public images alone (`--choose`): their classes
dog and automobile are taken from the head and given back by 10 clients of 600 public images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trust import Features

import fedpress
from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import FederatedData
from fedpress.data.load import load
from fedpress.pipeline import recipe as recipes

NEW = (3, 9)  # cat and truck
STAND_IN = (5, 1)  # dog and automobile, for the choice of learning rates
JOINT = {"uplink": [{"kind": "rotate"}, {"kind": "discretize", "bits": 18}]}
ARMS: dict[str, dict[str, Any]] = {
    "none": {"num_rounds": 20, "epochs": 5, "batch_size": 60},
    "local": {"num_rounds": 20, "batch_size": 300},
    "secure": {"num_rounds": 60, "batch_size": 300, **JOINT},
    "central": {"num_rounds": 60, "batch_size": 300},
}
RATES = {None: 10.0, 8.0: 30.0, 2.0: 10.0, 0.5: 10.0}  # epsilon -> learning rate


@dataclass(frozen=True)
class Trunk:
    """A network before the federation, and what it makes of all images.

    Attributes:
        model: the whole network; `model.head` is its linear head.
        parts: name -> features [n, d] and classes [n], centred and scaled.
        middle: mean of the public features [d].
        scale: what the centred features were divided by.
    """

    model: nn.Module
    parts: dict[str, Arrays]
    middle: Tensor
    scale: float

    def head(self) -> nn.Linear:
        """Returns the head for scaled features: the same logits as the network's own."""
        old = self.model.head
        head = nn.Linear(old.in_features, old.out_features)
        with torch.no_grad():
            head.weight.copy_(old.weight * self.scale)
            head.bias.copy_(old.bias + old.weight @ self.middle)
        return head

    def with_head(self, head: nn.Linear) -> nn.Module:
        """Returns the network with a head that was trained on scaled features."""
        model = deepcopy(self.model)
        with torch.no_grad():
            model.head.weight.copy_(head.weight / self.scale)
            model.head.bias.copy_(head.bias - head.weight @ self.middle / self.scale)
        return model


def trunk(run: Path, images: FederatedData, cache: Path) -> Trunk:
    """Returns the network of a run before its federation; features are computed once."""
    model = fedpress.load(run / "stages" / "2-fine-tune")
    path = cache / f"{run.name}.safetensors"
    if not path.exists():
        parts = {f"client/{name}": arrays for name, arrays in images.clients.items()}
        parts |= {"public": images.public, "validation": images.validation, "test": images.test}
        tensors, network = {}, Features(deepcopy(model))
        for name, arrays in parts.items():
            print(f"features of {name}", file=sys.stderr, flush=True)
            tensors[f"{name}/x"] = network.of(arrays.x, images.preprocess)
            tensors[f"{name}/y"] = arrays.y
        cache.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)
    tensors = load_file(path)
    middle = tensors["public/x"].mean(0)
    # Examples of norm 1 on average: one clip norm fits every width.
    scale = float((tensors["public/x"] - middle).norm(dim=1).mean())
    parts = {
        name[:-2]: Arrays((x - middle) / scale, tensors[f"{name[:-2]}/y"])
        for name, x in tensors.items()
        if name.endswith("/x")
    }
    return Trunk(model, parts, middle, scale)


def federated(trunk: Trunk) -> FederatedData:
    """Returns the clients' features, with the test images."""
    clients = {k.removeprefix("client/"): v for k, v in trunk.parts.items() if "/" in k}
    return _data(clients, trunk.parts["public"], trunk.parts["test"])


def stand_in(trunk: Trunk, seed: int) -> FederatedData:
    """Returns public images alone in the place of the clients' and the test's, for choices."""
    public = trunk.parts["public"]
    order = torch.randperm(len(public), generator=torch.Generator().manual_seed(seed))
    dealt = {f"{i}": public.take(order[600 * i : 600 * (i + 1)]) for i in range(10)}
    rest = public.take(order[6000:])
    shown = ~torch.isin(rest.y, torch.tensor(STAND_IN))
    return _data(dealt, rest.take(shown.nonzero().flatten()), trunk.parts["validation"])


def _data(clients: dict[str, Arrays], public: Arrays, test: Arrays) -> FederatedData:
    return FederatedData(
        name="features",
        clients=clients,
        public=public,
        validation=public.take(torch.arange(0)),
        test=test,
        num_classes=10,
        class_names=tuple(map(str, range(10))),
        preprocess=Preprocess(mean=(), std=()),
    )


def without(head: nn.Linear, public: Arrays) -> nn.Linear:
    """Returns a head that was trained on public examples without the stand-in classes."""
    model = fedpress.train(head, data=(public.x, public.y), epochs=10, lr=3.0, batch_size=256)
    return model.model


def taught(
    head: nn.Linear, data: FederatedData, arm: str, epsilon: float | None, seed: int, **more: Any
) -> Any:
    """Returns the result of one federation of the head."""
    how = {"lr": RATES.get(epsilon, 10.0)} | ARMS[arm] | more
    if epsilon is not None:
        how["privacy"] = {
            "unit": "sample", "trust": arm, "epsilon": epsilon, "delta": 1e-5, "clip_norm": 1.0,
        }  # fmt: skip
    if arm == "secure":
        how["aggregator"] = "secure"
    return fedpress.federate(head, data=data, progress=False, mean="none", **how, seed=seed)


def by_class(model: nn.Module, test: Arrays) -> dict[str, float]:
    """Returns the accuracy on all test examples, on the new classes, and on the others."""
    with torch.inference_mode():
        right = model(test.x).argmax(1) == test.y
    new = torch.isin(test.y, torch.tensor(NEW))
    parts = {"accuracy": right, "new": right[new], "old": right[~new]}
    return {name: round(100 * float(part.float().mean()), 2) for name, part in parts.items()}


def rows(
    known: Trunk, images: FederatedData, seed: int, epsilons: list[float]
) -> Iterator[dict[str, Any]]:
    """Yields one row for each arm of one seed."""
    data = federated(known)
    yield {"arm": "before", "epsilon": None, "seed": seed, **by_class(known.head(), data.test)}
    for arm in ARMS:
        for epsilon in [None] if arm == "none" else epsilons:
            result = taught(known.head(), data, arm, epsilon, seed)
            row = {
                "arm": arm,
                "epsilon": epsilon,
                "seed": seed,
                **by_class(result.model, data.test),
            }
            row |= {"up": result.after["bytes_up"], "down": result.after["bytes_down"]}
            if arm in ("none", "local") and epsilon in (None, 8.0):
                row["int8"] = in_int8(known.with_head(result.model), images)
            yield row


def in_int8(model: nn.Module, images: FederatedData) -> float:
    """Returns the test accuracy of the network in int8, in percent."""
    small = fedpress.quantize(
        model,
        data=images,
        bits=8,
        progress=False,
        mean=images.preprocess.mean,
        std=images.preprocess.std,
    )
    return round(100 * small.after["accuracy"], 2)


def table(found: list[dict[str, Any]], columns: Sequence[str]) -> str:
    """Returns mean and standard deviation over the seeds of each arm."""
    lines = [
        "| trust | epsilon | " + " | ".join(columns) + " |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    for arm, epsilon in dict.fromkeys((row["arm"], row["epsilon"]) for row in found):
        cells = []
        for column in columns:
            seen = [
                r[column]
                for r in found
                if (r["arm"], r["epsilon"]) == (arm, epsilon) and column in r
            ]
            spread = f" ± {statistics.stdev(seen):.2f}" if len(seen) > 1 else ""
            cells.append(f"{statistics.fmean(seen):.2f}{spread}" if seen else "–")
        lines.append(f"| {arm} | {epsilon or '–'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def choose(known: Trunk, epsilons: list[float], rates: list[float]) -> None:
    """Prints the accuracy on public validation images for each learning rate."""
    data = stand_in(known, 0)
    head = without(known.head(), data.public)
    for arm in ARMS:
        for epsilon in [None] if arm == "none" else epsilons:
            for lr in rates:
                result = taught(head, data, arm, epsilon, 0, lr=lr)
                line = {
                    "arm": arm,
                    "epsilon": epsilon,
                    "lr": lr,
                    "accuracy": result.after["accuracy"],
                }
                print(json.dumps(line), flush=True)


def main() -> None:
    """Prints a row for each arm, then the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder of cifar10-new-classes")
    parser.add_argument("--data", required=True, type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", required=True, type=Path, help="folder for the features")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[8.0, 2.0, 0.5])
    parser.add_argument("--choose", action="store_true", help="try learning rates on public images")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0, 30.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    text = (given.run / "recipe.toml").read_text("utf-8")
    settings = recipes.load(text, [f"data.path={json.dumps(str(given.data))}"])
    images = load(settings.data, settings.seed)
    known = trunk(given.run, images, given.out)
    if given.choose:
        choose(known, given.epsilon, given.lr)
        return
    found = []
    for seed in given.seeds:
        for row in rows(known, images, seed, given.epsilon):
            print(json.dumps(row), flush=True)
            found.append(row)
    print(table(found, ("accuracy", "new", "old", "int8", "up", "down")))


if __name__ == "__main__":
    main()
