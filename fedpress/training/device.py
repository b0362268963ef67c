"""Where and how numbers are computed: GPU or CPU, float32 or bfloat16, and the memory layout of images."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, map_inputs

Precision = Literal["auto", "float32", "bf16"]


def device() -> torch.device:
    """Returns the GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bf16(model: nn.Module, precision: Precision) -> bool:
    """Whether autocast to bfloat16 is used: "auto" says yes where it is faster (a GPU, or a CPU with the instructions).

    Small networks gain nothing from it, so "auto" leaves those of under half a million parameters in float32.
    """
    if precision != "auto":
        return precision == "bf16"
    large = sum(p.numel() for p in model.parameters()) >= 500_000
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    fast = device().type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return large and convolves and fast


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """Returns the context in which forward passes of `model` run."""
    if uses_bf16(model, precision):
        return torch.autocast(device().type, torch.bfloat16)
    return nullcontext()


def memory_format(x: Tensor, model: nn.Module | None = None) -> torch.memory_format:
    """Returns channels-last for images, the plain format else, and for a `model` that must not have it."""
    images = x.dim() == 4 and x.shape[1] > 1 and (model is None or takes_channels_last(model))
    return torch.channels_last if images else torch.contiguous_format


def laid_out(x: Inputs, model: nn.Module) -> Inputs:
    """Returns a batch in the memory format that is fast for `model`; of several inputs each."""
    return map_inputs(x, lambda t: t.contiguous(memory_format=memory_format(t, model)))


def takes_channels_last(model: nn.Module) -> bool:
    """Says whether the faster memory format is safe for `model` on this machine.

    On processors without AVX-512 torch 2.13 writes beyond its memory in the backward pass of a strided 1x1 convolution
    in this format, if it has fewer input channels than a vector register has floats, 8.
    """
    if device().type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return True
    return not any(
        isinstance(m, nn.Conv2d)
        and m.in_channels < 8
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        for m in model.modules()
    )


def place_(model: nn.Module) -> nn.Module:
    """Moves `model` to the device and gives its convolution weights the faster memory format where that is safe."""
    wanted = torch.channels_last if takes_channels_last(model) else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=wanted)
    return model.to(device())
