"""Three kinds of trust at equal epsilon: noise of each client's own, of all clients under a secure sum, of the server.

    python benchmarks/trust.py --data DIR --out DIR --epsilon 0.05 0.1 0.2 1 --seeds 0 1 2

A linear classifier is trained from nothing by 10 clients of 600 CIFAR-10 images each, on the 280 features of the pruned
ResNet-18 of benchmarks/checkpoints/cifar10-cpu. Examples are protected. `local` takes 2 steps of DP-SGD in each of 10
rounds; `secure` and `central` take 20 joint steps. The learning rate was chosen on the validation set at epsilon 0.2
from 1, 3, 10 and 30, for each kind by itself: 3 for all (for none at 1, 3, 10 and 30: 30).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpress import data as data_sets
from fedpress.core.examples import Arrays, Preprocess
from fedpress.data import FederatedData
from fedpress.data.settings import DataSettings
from fedpress.models import load_model
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline import run as runs
from fedpress.pipeline.keys import settings_of
from fedpress.pipeline.start import load_data
from fedpress.workspace.folder import RunFolder

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoints" / "cifar10-cpu"

TEXT = """
name = "trust"
[data]
source = "trust:features"
[model]
architecture = "mlp"
arguments = {{ in_features = {features}, hidden = [] }}
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 300
lr = {lr}
privacy = {{ unit = "sample", trust = "{trust}", epsilon = {epsilon}, delta = 1e-5, clip_norm = 1.0 }}
{more}
"""
KINDS = {
    "local": {"rounds": 10, "lr": 3.0, "more": ""},
    "secure": {
        "rounds": 20,
        "lr": 3.0,
        "more": 'uplink = [{ kind = "rotate" }, { kind = "discretize", bits = 18 }]',
    },
    "central": {"rounds": 20, "lr": 3.0, "more": ""},
    "none": {"rounds": 10, "lr": 30.0, "more": ""},
}


class Features(nn.Module):
    """The network without its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model.head = nn.Identity()
        self.model = model.eval()

    @torch.inference_mode()
    def of(self, x: Tensor, preprocess: Preprocess) -> Tensor:
        """Maps raw images [n, 3, 32, 32] to features [n, d]."""
        return torch.cat([self.model(preprocess(part)).float() for part in x.split(256)])


def prepare(data: Path, out: Path) -> Path:
    """Writes the features of all examples once, and returns the file."""
    path = out / "features.safetensors"
    if path.exists():
        return path
    settings = DataSettings(
        source="cifar10", path=data, num_clients=10, examples_per_client=600, validation=2000
    )
    loaded = data_sets.load(settings, 0)
    network = Features(load_model(CHECKPOINT)[1])
    parts = {f"client/{name}": arrays for name, arrays in loaded.clients.items()}
    parts |= {
        "public": loaded.public.take(torch.arange(2000)),
        "validation": loaded.validation,
        "test": loaded.test,
    }
    tensors = {}
    for name, arrays in parts.items():
        print(f"features of {name}", file=sys.stderr, flush=True)
        tensors[f"{name}/x"], tensors[f"{name}/y"] = (
            network.of(arrays.x, loaded.preprocess),
            arrays.y,
        )
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def features(path: Path) -> FederatedData:
    """Returns the data set of features in `path`; standardised with the public ones."""
    tensors = load_file(path)
    parts = {
        name[:-2]: Arrays(x, tensors[f"{name[:-2]}/y"])
        for name, x in tensors.items()
        if name.endswith("/x")
    }
    clients = {
        name.removeprefix("client/"): part
        for name, part in parts.items()
        if name.startswith("client/")
    }
    public = parts["public"].x
    middle, spread = public.mean(0), public.std()
    scale = (
        spread * public.shape[1] ** 0.5
    )  # examples of norm 1 on average: one clip norm fits every layer width
    parts = {name: Arrays((part.x - middle) / scale, part.y) for name, part in parts.items()}
    return FederatedData(
        name="features",
        clients={name: parts[f"client/{name}"] for name in clients},
        public=parts["public"],
        validation=parts["validation"],
        test=parts["test"],
        num_classes=10,
        class_names=tuple(map(str, range(10))),
        preprocess=Preprocess(mean=(), std=()),
    )


def accuracy(
    kind: str, epsilon: float, seed: int, path: Path, out: Path, lr: float | None
) -> tuple[float, float]:
    """Returns (validation, test) accuracy after one run."""
    how = KINDS[kind] | ({"lr": lr} if lr else {})
    width = load_file(path)["test/x"].shape[1]
    text = TEXT.format(
        features=width, trust="local" if kind == "none" else kind, epsilon=epsilon, **how
    )
    recipe = recipes.load(text, [f"seed={seed}", f"data.path={json.dumps(str(path))}"])
    if kind == "none":
        stage = recipe.stage[0].model_copy(update={"privacy": None, "epochs": 2, "batch_size": 60})
        recipe = recipe.model_copy(update={"stage": (stage,)})
    place = out / f"{kind}-{epsilon:g}-{how['lr']:g}-{seed}"
    settings = settings_of(recipe)
    folder = (
        RunFolder.resume(place, settings)
        if place.exists()
        else RunFolder.create(place, text, settings)
    )
    for _ in runs.execute(recipe, folder, load_data(recipe)):
        pass
    records = [json.loads(line) for line in folder.records.path.read_text("utf-8").splitlines()]
    result = json.loads((place / "result.json").read_text("utf-8"))["stages"][-1]
    return records[-1]["accuracy"], result["accuracy"]


def main() -> None:
    """Prints a table: a row for each kind of trust, a column for each epsilon."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, type=Path, help="folder of CIFAR-10")
    parser.add_argument("--out", required=True, type=Path, help="folder for features and runs")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.05, 0.1, 0.2, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--lr", type=float, nargs="+", help="try these instead, and print validation accuracy"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    path = prepare(args.data, args.out)
    for kind in args.kinds:
        for epsilon in args.epsilon if kind != "none" else [0.0]:
            for lr in args.lr or [None]:
                found = [
                    accuracy(kind, epsilon or 1.0, seed, path, args.out, lr) for seed in args.seeds
                ]
                seen = [f[0 if args.lr else 1] for f in found]
                spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
                print(json.dumps({"trust": kind, "epsilon": epsilon or None, "lr": lr or KINDS[kind]["lr"],
                                  "accuracy": round(statistics.mean(seen), 4), "spread": round(spread, 4),
                                  "runs": len(seen)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
