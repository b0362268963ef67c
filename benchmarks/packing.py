"""The size of packed models, by kind of bytes, beside general compressors and the entropy of the codes.

    python benchmarks/packing.py [--out DIR]

From the checkpoint `checkpoints/cifar10-cpu` (ResNet-18 at 30% of its parameters): float32; batch norms folded and 8
bits; and cut on to 10% of ResNet-18 (L2 scores, no training after it, which a size hardly feels), folded, 4 bits with
min-max or least-squares scales. Compressors get the raw codes, one byte each (4 bits: two to a byte as well). The
entropy is that of each layer's codes by themselves, without tables. Times are of one thread.
"""

from __future__ import annotations

import argparse
import copy
import lzma
import tempfile
import time
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import zstandard
from torch import nn

from fedpress import compress, storage
from fedpress.compress.quantize import find_folds, fit_scales_, fold_
from fedpress.models import ModelSpec, load_model, what_pruning_changed
from fedpress.nn.quant_scheme import QuantizationScheme, WeightQuantization
from fedpress.nn.quantized import materialize_, quantize_layers_, quantized_layers

RESNET18 = 11_173_962


def cut(spec: ModelSpec, model: nn.Module, share: float) -> tuple[ModelSpec, nn.Module]:
    """Removes channels until `share` of the parameters of a whole ResNet-18 are left."""
    model = copy.deepcopy(model).eval()
    graph = compress.trace(model, torch.zeros(2, *spec.input_shape))
    keep = share * RESNET18 / compress.parameters(model)
    plan = compress.plan(
        model, graph, compress.score(model, graph, "l2"), keep_params=keep, round_to=4
    )
    compress.remove_(model, plan)
    return spec.model_copy(update=what_pruning_changed(model, spec.build_dense())), model


def quantized(
    spec: ModelSpec, model: nn.Module, bits: int, scale: Literal["mse", "minmax"], *, folded: bool
) -> tuple[ModelSpec, nn.Module]:
    """Folds batch norms if wanted and puts every weight on a grid of `bits`."""
    model = copy.deepcopy(model).eval()
    folds = find_folds(model, torch.zeros(2, *spec.input_shape))[0] if folded else {}
    fold_(model, folds)
    layers = (n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear))
    table = {name: QuantizationScheme(weights=WeightQuantization(bits=bits)) for name in layers}
    quantize_layers_(model, table)
    for _, layer in quantized_layers(model):
        fit_scales_(layer, scale=scale)
    return spec.model_copy(update={"folded": folds, "quantized": table}), materialize_(model)


def rivals(model: nn.Module, bits: int) -> dict[str, int]:
    """Bytes of all codes under general compressors, and their entropy."""
    codes = [layer.quantize().numpy().reshape(-1) for _, layer in quantized_layers(model)]
    raw = b"".join(c.tobytes() for c in codes)
    forms = {"": raw}
    if bits == 4:
        flat = np.concatenate(codes).view(np.uint8) & 15
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        forms["2 a byte, "] = (flat[::2] | flat[1::2] << 4).tobytes()
    out = {"plain": len(raw) * bits // 8}
    for name, data in forms.items():
        out[f"{name}zlib -9"] = len(zlib.compress(data, 9))
        out[f"{name}zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(data))
        out[f"{name}xz -9"] = len(lzma.compress(data, preset=9))
    shares = [np.unique(c, return_counts=True)[1] / len(c) for c in codes]
    out["entropy"] = round(
        sum(-(p * np.log2(p)).sum() * len(c) for p, c in zip(shares, codes, strict=True)) / 8
    )
    return out


def main() -> None:
    """Prints a block for each model."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="keep the packed files here")
    out = parser.parse_args().out or Path(tempfile.mkdtemp())
    spec, model = load_model(Path(__file__).parent / "checkpoints" / "cifar10-cpu")
    small = cut(spec, model, 0.1)
    cases = {
        "30%, float32": ((spec, model), 32),
        "30%, int8, batch norms kept": (quantized(spec, model, 8, "minmax", folded=False), 8),
        "30%, int8": (quantized(spec, model, 8, "minmax", folded=True), 8),
        "10%, int4": (quantized(*small, 4, "minmax", folded=True), 4),
        "10%, int4, least squares": (quantized(*small, 4, "mse", folded=True), 4),
    }
    for name, (pair, bits) in cases.items():
        start = time.process_time()
        packed = storage.pack(*pair, out / f"{name}.safetensors")
        middle = time.process_time()
        storage.unpack(out / f"{name}.safetensors")
        end = time.process_time()
        kinds = ", ".join(f"{kind} {size:,}" for kind, size in packed.kinds.items())
        print(f"{name}: {compress.parameters(pair[1]):,} parameters, file {packed.file_bytes:,} bytes ({kinds}); "
              f"pack and verify {middle - start:.1f} s, unpack {end - middle:.1f} s")  # fmt: skip
        if bits < 32:
            print(
                "  codes under others: "
                + ", ".join(f"{k} {v:,}" for k, v in rivals(pair[1], bits).items())
            )


if __name__ == "__main__":
    main()
