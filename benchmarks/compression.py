"""What is lost when a ResNet-18 is cut: fedpress against torch-pruning, at equal epochs.

    python benchmarks/compression.py --data DIR --out DIR --arms taylor tp-magnitude --keep 0.333 --seeds 0
    python benchmarks/compression.py --data DIR --out DIR --parent dense --keep 0.3 0.1

The parent is the network of benchmarks/checkpoints/cifar10-cpu (3.36 M parameters, 93.17%), or with `--parent dense` a
whole ResNet-18 (11.17 M) that is trained first, small enough for two cores: 20,000 images at 16 pixels. Every arm
removes channels until `--keep` of the parent's parameters stay, restores the batch-norm statistics on the same public
images, and is fine-tuned by the same loop, epochs and seed; arms that end in `+teacher` also learn from the parent's
logits. "dense" is the parent, trained on by the same loop: what a cut is to be compared with. "taylor-macs" keeps that
share of the multiply-adds, "sparse" of the weights, by magnitude and a gradual schedule over the same epochs. Each
finished arm is one line of OUT/compression.jsonl with its model beside it, and an arm that is there is not repeated.
Test accuracy is measured once at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torch_pruning as tp
from pruned_resnet import cifar10, network
from torch import Tensor, nn

import fedpress
from fedpress import compress
from fedpress.compress.prune.targets import macs_target
from fedpress.core.examples import Arrays
from fedpress.data import FederatedData
from fedpress.models import ModelSpec, load_model, save_model, what_pruning_changed
from fedpress.tasks import Task
from fedpress.training.evaluate import evaluate
from fedpress.training.fit import EpochRecord, Fit, Objective
from fedpress.training.settings import TrainSettings

CALIBRATION, BATCH = 2048, 256


def losses(
    model: nn.Module, public: Arrays, preprocess: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yields the loss of each batch of the calibration images."""
    for x, y in zip(public.x.split(BATCH), public.y.split(BATCH), strict=True):
        yield F.cross_entropy(model(preprocess(x)), y)


def ours(score: str, strategy: str = "one-shot", macs: bool = False) -> Callable[..., nn.Module]:
    """Returns an arm that cuts with fedpress."""

    def cut(
        model: nn.Module, keep: float, public: Arrays, preprocess: Callable[[Tensor], Tensor]
    ) -> nn.Module:
        graph = compress.trace(model, torch.zeros(2, *public.x.shape[1:]))
        chance = torch.Generator().manual_seed(0)
        options = {"losses": lambda: losses(model, public, preprocess), "generator": chance}
        if strategy == "single-channel":
            plan = compress.prune_single_channel(model, graph, score, keep_params=keep, **options)
        else:
            scores = compress.score(model, graph, score, **options)
            target = macs_target(graph, keep) if macs else None
            plan = compress.plan(model, graph, scores, keep_params=keep, target=target)
        compress.remove_(model, plan)
        return model

    return cut


def theirs(importance: Callable[[], object], *, gradients: bool) -> Callable[..., nn.Module]:
    """Returns an arm that cuts with torch-pruning, its global ranking, at the ratio that leaves `keep`."""

    def cut(
        model: nn.Module, keep: float, public: Arrays, preprocess: Callable[[Tensor], Tensor]
    ) -> nn.Module:
        total = compress.parameters(model)
        if gradients:
            for loss in losses(model, public, preprocess):
                loss.backward()
        slopes = [p.grad for p in model.parameters()]

        def at(ratio: float) -> nn.Module:
            small = copy.deepcopy(model)
            pruner = tp.pruner.BasePruner(
                small,
                torch.zeros(2, *public.x.shape[1:]),
                importance=importance(),
                pruning_ratio=ratio,
                max_pruning_ratio=0.9,
                global_pruning=True,
                round_to=8,
                ignored_layers=[small.head],
            )
            for parameter, slope in zip(small.parameters(), slopes, strict=True):
                parameter.grad = None if slope is None else slope.clone()
            pruner.step()
            return small.zero_grad() or small

        low, high = 0.0, 0.95
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if compress.parameters(at(middle)) > keep * total else (low, middle)
            )
        return at(high)

    return cut


def whole(
    model: nn.Module, keep: float, public: Arrays, preprocess: Callable[[Tensor], Tensor]
) -> nn.Module:
    """The arm that cuts nothing."""
    return model


ARMS: dict[str, Callable[..., nn.Module]] = {
    "dense": whole,
    "taylor": ours("taylor"),
    "taylor-macs": ours("taylor", macs=True),
    "l1": ours("l1"),
    "random": ours("random"),
    "taylor-single": ours("taylor", "single-channel"),
    "tp-magnitude": theirs(lambda: tp.importance.GroupMagnitudeImportance(p=2), gradients=False),
    "tp-taylor": theirs(tp.importance.GroupTaylorImportance, gradients=True),
}


def settings(epochs: int, small: int) -> TrainSettings:
    """The fine-tuning of every arm: `small` epochs at 24 pixels, then the rest at 32."""
    return TrainSettings(
        epochs=epochs,
        image_sizes=((24, small),) if small else (),
        batch_size=256,
        optimizer="muon",
        lr=0.05,
        momentum=0.8,
        weight_decay=0.1,
        warmup=0.1,
        label_smoothing=0.1,
        ema=0.99,
        augment={"crop": 0.125, "flip": "alternate", "cutout": 0.25},
    )


def dense(parts: FederatedData, epochs: int, out: Path) -> tuple[ModelSpec, nn.Module]:
    """Returns a whole ResNet-18, trained from scratch; it is trained only if OUT/dense is not there."""
    place = out / "dense"
    if not (place / "spec.json").exists():
        spec = ModelSpec(
            architecture="resnet18",
            input_shape=parts.example_shape,
            mean=parts.preprocess.mean,
            std=parts.preprocess.std,
            class_names=parts.class_names,
        )
        torch.manual_seed(0)
        fit = Fit(spec.build(), settings(epochs, 0), task=parts.task, seed=0)
        for event in fit.epochs(parts.public, parts.validation, parts.preprocess):
            if isinstance(event, EpochRecord):
                print(
                    f"parent: epoch {event.epoch}, validation {event.score:.2%}",
                    file=sys.stderr,
                    flush=True,
                )
        save_model(place, spec, fit.result_())
    return load_model(place)


def soft(
    teacher: nn.Module, task: Task, *, temperature: float = 2.0, weight: float = 0.9
) -> Objective:
    """Hinton's loss: `weight` of the teacher's softened answers, the rest cross-entropy with the labels."""
    teacher = teacher.eval()

    def objective(model: nn.Module, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x).float()
        taught = task.soft_loss(logits, wanted, temperature)
        return weight * taught + (1 - weight) * task.loss(logits, y)

    return objective


def run(
    arm: str,
    keep: float,
    seed: int,
    parts: FederatedData,
    parent: tuple[ModelSpec, nn.Module],
    how: TrainSettings,
) -> tuple[dict[str, object], ModelSpec, nn.Module]:
    """Cuts, restores, fine-tunes and measures one arm."""
    name, _, teacher = arm.partition("+")
    spec, before = parent[0], copy.deepcopy(parent[1]).eval()
    if name == "sparse":
        training = how.model_dump(mode="json", exclude_unset=True)
        sparse = {"density": keep, "schedule": "gradual", "every": 10, "seed": seed}
        model, line = fedpress.sparsify(before, data=parts, **sparse, **training).model, {}
    else:
        began = time.perf_counter()
        chosen = torch.randperm(len(parts.public), generator=torch.Generator().manual_seed(seed))[
            :CALIBRATION
        ]
        public = parts.public.take(chosen)
        model = ARMS[name](before, keep, public, parts.preprocess)
        cut = time.perf_counter() - began
        compress.restore_batch_norm_(model, (parts.preprocess(x) for x in public.x.split(BATCH)))
        line = {
            "cut_seconds": round(cut, 2),
            "accuracy_cut": evaluate(model, parts.test, parts.preprocess, parts.task).score,
        }
        objective = soft(copy.deepcopy(parent[1]), parts.task) if teacher else None
        fit = Fit(model, how, task=parts.task, seed=seed, objective=objective)
        for event in fit.epochs(parts.public, parts.validation, parts.preprocess):
            if isinstance(event, EpochRecord):
                says = f"{arm} {keep:.3f} seed {seed}: epoch {event.epoch}, validation {event.score:.2%}"
                print(says, file=sys.stderr, flush=True)
        model = fit.result_()
    line |= {
        "parameters": compress.parameters(model),
        "macs": compress.macs(model, torch.zeros(1, *parts.example_shape)),
        "accuracy": evaluate(model, parts.test, parts.preprocess, parts.task).score,
    }
    return line, spec.model_copy(update=what_pruning_changed(model, spec.build_dense())), model


def main() -> None:
    """Runs what is not there yet, then prints the table."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--parent", choices=["checkpoint", "dense"], default="checkpoint")
    words.add_argument("--parent-epochs", type=int, default=6, help="with --parent dense")
    words.add_argument(
        "--arms", nargs="+", default=["taylor", "taylor+teacher", "tp-magnitude", "tp-taylor"]
    )
    words.add_argument("--keep", type=float, nargs="+", default=[1 / 3])
    words.add_argument("--seeds", type=int, nargs="+", default=[0])
    words.add_argument("--epochs", type=int, default=4)
    words.add_argument(
        "--small", type=int, default=3, help="of them at 24 pixels; 0 with --parent dense"
    )
    chosen = words.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "compression.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if chosen.parent == "dense":
        chosen.small = 0
        parts = cifar10(chosen.data, "data.image_size=16", "data.examples_per_client=2800")
        parent = dense(parts, chosen.parent_epochs, chosen.out)
    else:
        parts, parent = cifar10(chosen.data), network()
    accuracy = evaluate(parent[1], parts.test, parts.preprocess, parts.task).score
    print(f"parent: {compress.parameters(parent[1]):,} parameters, {accuracy:.2%}", flush=True)
    for seed in chosen.seeds:
        for keep, arm in [(keep, arm) for keep in chosen.keep for arm in chosen.arms]:
            keep = 1.0 if arm.partition("+")[0] == "dense" else keep
            key = {"arm": arm, "keep": keep, "seed": seed, "epochs": [chosen.epochs, chosen.small]}
            if not any(key.items() <= line.items() for line in lines):
                how = settings(chosen.epochs, chosen.small)
                line, spec, model = run(arm, keep, seed, parts, parent, how)
                save_model(chosen.out / f"{arm}-{keep:.3f}-{seed}", spec, model)
                lines.append(key | line)
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
    print(
        "| arm | kept | parameters | MACs | after the cut | tuned | seeds |\n" + "| --- " * 7 + "|"
    )
    for keep, arm in dict.fromkeys((line["keep"], line["arm"]) for line in lines):
        group = [line for line in lines if (line["keep"], line["arm"]) == (keep, arm)]
        tuned = [100 * line["accuracy"] for line in group]
        spread = f" ± {statistics.stdev(tuned):.2f}" if len(tuned) > 1 else ""
        mean = {k: statistics.mean(line[k] for line in group) for k in ("parameters", "macs")}
        cut = statistics.mean(line.get("accuracy_cut", float("nan")) for line in group)
        print(
            f"| {arm} | {keep:.3f} | {mean['parameters']:,.0f} | {mean['macs'] / 1e6:.0f} M | {cut:.2%} "
            f"| {statistics.mean(tuned):.2f}{spread} | {len(group)} |"
        )


if __name__ == "__main__":
    main()
