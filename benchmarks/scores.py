"""How good each channel score is, and each way to spread a cut over the layers: a small ResNet on handwritten digits.

    python benchmarks/scores.py --seeds 0 1 2 --out scores.jsonl

Each network is trained, cut to `--keep` of its parameters, gets its batch-norm statistics from public examples, and is
fine-tuned for `--epochs`. Scores at initialisation cut the untrained network instead. Test accuracies in percent:
before the fine-tuning and after.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedpress import compress, data
from fedpress.compress import SCORES
from fedpress.core.examples import Arrays
from fedpress.core.random import derive
from fedpress.core.random_source import public_stream
from fedpress.data import FederatedData
from fedpress.models.resnet import resnet_small
from fedpress.pipeline.recipe import load
from fedpress.training.augment import Augment
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import Fit
from fedpress.training.settings import TrainSettings

RECIPE = """
[data]
source = "digits"
num_clients = 2
examples_per_client = 60
validation = 200
[model]
architecture = "resnet-small"
[[stage]]
kind = "export"
"""
EARLY = ("snip", "grasp")
SCOPES = ("global", "layer", "sensitivity")


def trained(
    model: nn.Module, examples: FederatedData, epochs: int, seed: int, **more: float
) -> nn.Module:
    """Trains `model` on the public part."""
    settings = TrainSettings(
        epochs=epochs, batch_size=64, lr=0.1, augment=Augment(crop=0.125), **more
    )
    fit = Fit(model, settings, task=examples.task, seed=seed)
    empty = Arrays(examples.validation.x[:0], examples.validation.y[:0])
    for _ in fit.epochs(examples.public, empty, examples.preprocess):
        pass
    return fit.result_().eval()


def cut(
    model: nn.Module, examples: FederatedData, name: str, scope: str, keep: float, seed: int
) -> nn.Module:
    """Removes channels of a copy of `model` and restores its batch-norm statistics."""
    model, public = copy.deepcopy(model).eval(), examples.public.take(torch.arange(512))
    size = 1 if SCORES[name].per_example else 256

    def losses() -> Iterator[Tensor]:
        for x, y in zip(public.x.split(size), public.y.split(size), strict=True):
            yield F.cross_entropy(model(examples.preprocess(x)), y)

    def measure() -> tuple[float, float]:
        found = evaluate(model, examples.validation, examples.preprocess, examples.task)
        return found.loss, found.score

    graph = compress.trace(model, examples.preprocess(public.x[:2]))
    scores = compress.score(
        model, graph, name, losses=losses, generator=public_stream(seed, "random")
    )
    points = (
        list(compress.sensitivity(compress.channel_units(model, graph, scores), measure))
        if scope == "sensitivity"
        else []
    )
    plan = compress.plan(
        model, graph, scores, keep_params=keep, scope=scope, points=points, round_to=2
    )
    compress.remove_(model, plan)
    compress.restore_batch_norm_(model, (examples.preprocess(x) for x in public.x.split(256)))
    return model


def run(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yields one row for every seed, score and scope."""
    recipe = load(RECIPE)
    for seed in options.seeds:
        examples = data.load(recipe.data, derive(seed, "data"))
        torch.manual_seed(seed)
        fresh = resnet_small(in_channels=1, width=16)
        dense = trained(copy.deepcopy(fresh), examples, options.train, seed)
        slim = trained(
            copy.deepcopy(fresh), examples, options.train, seed, bn_penalty=options.penalty
        )
        yield {"seed": seed, "arm": "dense", "after": share(dense, examples)}
        arms = [(name, "global") for name in SCORES] + [
            (name, s) for name in ("l1", "taylor") for s in SCOPES[1:]
        ]
        for name, scope in [*arms, ("bn_scale+penalty", "global")]:
            start, row = time.perf_counter(), name.partition("+")[0]
            parent = fresh if row in EARLY else slim if "+" in name else dense
            small = cut(parent, examples, row, scope, options.keep, seed)
            seconds, before = time.perf_counter() - start, share(small, examples)
            # What was cut untrained gets the training of the dense network besides.
            epochs = options.epochs + (options.train if row in EARLY else 0)
            after = share(trained(small, examples, epochs, seed + 1), examples)
            yield {
                "seed": seed,
                "arm": f"{name}, {scope}",
                "before": before,
                "after": after,
                "seconds": seconds,
            }


def share(model: nn.Module, examples: FederatedData) -> float:
    """Returns the test accuracy in percent."""
    return 100 * evaluate(model, examples.test, examples.preprocess, examples.task).score


def table(rows: list[dict[str, object]]) -> str:
    """Returns mean and spread over the seeds, one line for each arm."""
    lines = ["| score, scope | cut | fine-tuned |", "| --- | --- | --- |"]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = []
        for key in ("before", "after"):
            values = [float(str(row[key])) for row in own if key in row]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the comparison and prints its table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--train", type=int, default=12, help="epochs of the dense network")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--penalty", type=float, default=0.01)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with options.out.open("a") as file:
        for row in run(options):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
