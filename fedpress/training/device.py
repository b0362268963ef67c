"""Where and how numbers are computed: GPU or CPU, float32 or bfloat16, and the memory layout of images."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor, nn

from fedpress.core.inputs import Inputs, map_inputs
from fedpress.errors import Argument, SettingError, TrainingError, inside, suggestion

Precision = Literal["auto", "float32", "bf16"]
NAMES = ("auto", "cpu", "cuda", "cuda:1", "mps")
"""Names of devices, for people; any number may stand behind "cuda:"."""


def check_name(name: str) -> str:
    """Returns the `name` of a device, which this machine need not have.

    Raises:
        SettingError: if no device is called so.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", name):
        raise SettingError(
            f"no device is called '{name}' (known: {', '.join(NAMES)})",
            cure=suggestion(name, NAMES) or "choose one of them",
        )
    return name


DeviceName = Annotated[str, AfterValidator(check_name)]


def devices() -> tuple[str, ...]:
    """Returns the names of the devices of this machine; the CPU is the last one."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    apple = ["mps"] if torch.backends.mps.is_available() else []
    return (*gpus, *apple, "cpu")


def find(name: str = "auto") -> torch.device:
    """Returns the device of this `name`.

    Args:
        name: "auto" for the first CUDA GPU where there is one, else the CPU; or the name of a device, see `devices`.
            An Apple GPU ("mps") computes no float64, so it is used only where somebody asks for it.

    Raises:
        TrainingError: if this machine has no such device, with those that it has.
        SettingError: if no device is called so.
    """
    with inside("device"):
        check_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = devices()
    known = (*here, "cuda") if "cuda:0" in here else here
    if name not in known:
        raise TrainingError(
            f"there is no '{name}' on this machine, which has {', '.join(here)}",
            place="device",
            cure=("give ", Argument("device", here[0]), ", or leave it out"),
        )
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """Returns where the numbers of `model` lie; the CPU if it has none."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def uses_bf16(model: nn.Module, precision: Precision) -> bool:
    """Whether autocast to bfloat16 is used: "auto" says yes where it is faster (a GPU, or a CPU with the instructions).

    Small networks gain nothing from it, so "auto" leaves those of under half a million parameters in float32.
    """
    if precision != "auto":
        return precision == "bf16"
    large = sum(p.numel() for p in model.parameters()) >= 500_000
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    fast = device_of(model).type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return large and convolves and fast


def autocast(model: nn.Module, precision: Precision) -> AbstractContextManager[object]:
    """Returns the context in which forward passes of `model` run."""
    if uses_bf16(model, precision):
        return torch.autocast(device_of(model).type, torch.bfloat16)
    return nullcontext()


def memory_format(x: Tensor, model: nn.Module | None = None) -> torch.memory_format:
    """Returns channels-last for images, the plain format else, and for a `model` that must not have it."""
    images = x.dim() == 4 and x.shape[1] > 1 and (model is None or takes_channels_last(model))
    return torch.channels_last if images else torch.contiguous_format


def laid_out(x: Inputs, model: nn.Module) -> Inputs:
    """Returns a batch in the memory format that is fast for `model`; of several inputs each."""
    return map_inputs(x, lambda t: t.contiguous(memory_format=memory_format(t, model)))


def takes_channels_last(model: nn.Module, at: torch.device | None = None) -> bool:
    """Says whether the faster memory format is safe for `model` on the device `at`, by default on its own.

    On processors without AVX-512 torch 2.13 writes beyond its memory in the backward pass of a strided 1x1 convolution
    in this format, if it has fewer input channels than a vector register has floats, 8.
    """
    at = at or device_of(model)
    if at.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return True
    return not any(
        isinstance(m, nn.Conv2d)
        and m.in_channels < 8
        and m.kernel_size == (1, 1)
        and m.stride != (1, 1)
        for m in model.modules()
    )


def place_(model: nn.Module, at: torch.device | None = None) -> nn.Module:
    """Moves `model` and gives its convolution weights the faster memory format where that is safe.

    Args:
        model: changed in place.
        at: where to; None: as `find` chooses.
    """
    at = at or find()
    wanted = torch.channels_last if takes_channels_last(model, at) else torch.contiguous_format
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=wanted)
    return model.to(at)
