"""What fewer bits cost: accuracy and packed size of one trained network, rounded after training in every way.

    python benchmarks/bits.py --data DIR --out DIR

The network is that of benchmarks/checkpoints/cifar10-cpu (ResNet-18 cut to 3.36 M parameters). Every arm starts with
its batch norms folded and sees the same 512 public images; nothing is trained. `drop` is in points of test accuracy,
`agree` the share of test images with the answer of the float network; `--images` takes only the first ones. Each
finished arm is a line of OUT/bits.jsonl, and one that is there is not repeated. Arms that begin with `torchao` need
torchao 0.18 and are left out without it.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pruned_resnet import cifar10, network
from torch import Tensor, nn

from fedpress.compress.quantize import find_folds, fold_, quantizable, quantize_
from fedpress.data import FederatedData
from fedpress.models import ModelSpec
from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
from fedpress.storage.packed import to_bytes

CALIBRATION, BATCH = 512, 64
GPTQ: dict[str, Any] = {"rounding": "second-order"}
BYTE = InputQuantization()
ARMS: dict[str, tuple[WeightQuantization, InputQuantization | None, dict[str, Any]]] = {
    "int8 weights and inputs": (WeightQuantization(), BYTE, {}),
    "the same, entropy ranges": (WeightQuantization(), BYTE, {"observer": "entropy"}),
    "the same, percentile ranges": (WeightQuantization(), BYTE, {"observer": "percentile"}),
    "the same, least-squares ranges": (WeightQuantization(), BYTE, {"observer": "mse"}),
    "the same, dynamic ranges": (WeightQuantization(), InputQuantization(dynamic=True), {}),
    "int4, span, nearest, biases as they are": (
        WeightQuantization(bits=4),
        None,
        {"scale": "minmax", "correct_bias": False},
    ),
    "int4, nearest": (WeightQuantization(bits=4), None, {}),
    "int4": (WeightQuantization(bits=4), None, GPTQ),
    "int4, groups of 32": (WeightQuantization(bits=4, group=32), None, GPTQ),
    "int4, inputs of 8 bits": (WeightQuantization(bits=4), BYTE, GPTQ),
    "int3": (WeightQuantization(bits=3), None, GPTQ),
    "int3, groups of 32": (WeightQuantization(bits=3, group=32), None, GPTQ),
    "ternary, first and last float": (WeightQuantization(kind="ternary"), None, GPTQ),
    "16 shared values": (WeightQuantization(kind="codebook", bits=4), None, GPTQ),
    "8 shared values": (WeightQuantization(kind="codebook", bits=3), None, GPTQ),
}


def ours(arm: str) -> Callable[[ModelSpec, nn.Module, list[Tensor]], tuple[nn.Module, int | None]]:
    """Returns an arm of `ARMS`: a model -> the quantized one and the bytes of its packed file."""
    weights, inputs, how = ARMS[arm]

    def quantized(
        spec: ModelSpec, model: nn.Module, batches: list[Tensor]
    ) -> tuple[nn.Module, int]:
        folds, _ = find_folds(model, torch.zeros(2, 3, 32, 32))
        fold_(model, folds)
        keep = ("first", "last") if "first and last" in arm else ()
        table, _ = quantizable(model, QuantizationScheme(weights=weights, inputs=inputs), keep=keep)
        quantize_(model, table, batches, **how)
        spec = spec.model_copy(update={"folded": folds, "quantized": table})
        return model, len(to_bytes(spec, model)[0])

    return quantized


def torchao_weights(
    spec: ModelSpec, model: nn.Module, batches: list[Tensor]
) -> tuple[nn.Module, None]:
    """`quantize_(model, Int8WeightOnlyConfig())` as its documentation shows it: it takes linear layers only."""
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as theirs

    theirs(model, Int8WeightOnlyConfig())
    return model, None


def torchao_pt2e(
    spec: ModelSpec, model: nn.Module, batches: list[Tensor]
) -> tuple[nn.Module, None]:
    """Static int8 by PT2E with the x86 quantizer: weights per channel, inputs by histograms."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    shapes = ({0: torch.export.Dim("n", min=1, max=1024)},)
    program = torch.export.export(model, (batches[0],), dynamic_shapes=shapes).module()
    quantizer = x86.X86InductorQuantizer().set_global(
        x86.get_default_x86_inductor_quantization_config()
    )
    prepared = prepare_pt2e(program, quantizer)
    for x in batches:
        prepared(x)
    return convert_pt2e(prepared), None


RIVALS = {
    "torchao quantize_, int8 weights": torchao_weights,
    "torchao PT2E, static int8": torchao_pt2e,
}


@torch.no_grad()
def answers(model: nn.Module, parts: FederatedData, images: int) -> Tensor:
    """Returns the class [images] that `model` gives each of the first test images."""
    return torch.cat(
        [model(parts.preprocess(x)).argmax(1) for x in parts.test.x[:images].split(250)]
    )


def main() -> None:
    """Runs what is not there yet, then prints the table."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--data", type=Path, required=True, help="CIFAR-10")
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--arms", nargs="+", default=[*ARMS, *RIVALS])
    words.add_argument("--images", type=int, default=10_000, help="test images")
    chosen = words.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / "bits.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    parts = cifar10(chosen.data)
    spec, parent = network()
    parent.eval()
    picked = torch.randperm(len(parts.public), generator=torch.Generator().manual_seed(0))[
        :CALIBRATION
    ]
    batches = [parts.preprocess(x) for x in parts.public.take(picked).x.split(BATCH)]
    labels = parts.test.y[: chosen.images]
    float_answers = answers(parent, parts, chosen.images)
    right = float((float_answers == labels).float().mean())
    for arm in chosen.arms:
        if (arm, len(labels)) in [(line["arm"], line["images"]) for line in lines] or (
            arm in RIVALS and not importlib.util.find_spec("torchao")
        ):
            continue
        began = time.process_time()
        make = RIVALS[arm] if arm in RIVALS else ours(arm)
        model, size = make(spec, copy.deepcopy(parent), batches)
        seconds = time.process_time() - began
        given = answers(model, parts, chosen.images)
        accuracy = float((given == labels).float().mean())
        agree = float((given == float_answers).float().mean())
        row = {
            "arm": arm,
            "images": len(labels),
            "accuracy": accuracy,
            "drop": right - accuracy,
            "agree": agree,
            "bytes": size,
        }
        lines.append({**row, "seconds": round(seconds, 1)})
        with file.open("a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
    print(
        f"| float network: {right:.2%} | accuracy | drop, points | agree | packed, bytes | seconds |\n"
        + "| --- " * 6
        + "|"
    )
    for line in (line for line in lines if line["images"] == len(labels)):
        size = f"{line['bytes']:,}" if line["bytes"] else ""
        print(
            f"| {line['arm']} | {line['accuracy']:.2%} | {100 * line['drop']:+.2f} | {line['agree']:.2%} | {size} | "
            f"{line['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
