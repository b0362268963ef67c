"""Chooses the device, the precision (float32 or bfloat16) and the memory layout of a training."""

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
"""Number format of forward passes; `uses_bf16` says when "auto" is bf16."""
NAMES = ("auto", "cpu", "cuda", "cuda:1", "mps")
"""Valid device names, for errors; any number may follow "cuda:"."""


def check_name(name: str) -> str:
    """Returns `name` if it is a valid name of a device. This machine need not have the device.

    Raises:
        SettingError: if the name is not valid.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", name):
        raise SettingError(
            f"no device is called '{name}' (known: {', '.join(NAMES)})",
            cure=suggestion(name, NAMES) or "choose one of them",
        )
    return name


DeviceName = Annotated[str, AfterValidator(check_name)]
"""A valid name of a device, as a type for pydantic."""


def devices() -> tuple[str, ...]:
    """Returns the names of the devices of this machine; the CPU is the last one."""
    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return (*found, "cpu")


def find(name: str = "auto") -> torch.device:
    """Returns the device with this `name`.

    Args:
        name: a name from `devices()`; "cuda", torch's current CUDA GPU, by default the first; or
            "auto", which means "cuda" if there is a CUDA GPU, else the CPU. "auto" never chooses an
            Apple GPU ("mps"), because Apple GPUs have no float64.

    Raises:
        TrainingError: if this machine has no such device; the error lists the devices it has.
        SettingError: if the name is not valid.
    """
    with inside("device"):
        check_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = devices()
    # In torch "cuda" is the current GPU, by default the first one.
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in here:
        raise TrainingError(
            f"there is no '{name}' on this machine, which has {', '.join(here)}",
            place="device",
            cure=("give ", Argument("device", here[0]), ", or leave it out"),
        )
    return torch.device(name)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the first tensor of `model`; the CPU if the model has no tensor."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def uses_bf16(model: nn.Module, precision: Precision) -> bool:
    """Returns whether forward passes use autocast to bfloat16.

    "auto" uses it for convolutional networks of at least 500,000 parameters, on a CUDA GPU or a CPU
    with AVX-512 bfloat16 instructions. In measurements smaller networks were not faster with it.
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
    """Returns the memory format of a batch: channels-last or contiguous.

    It is channels-last for images of several channels, if `takes_channels_last(model)`.

    Args:
        x: a batch [n, ...].
        model: the model that gets the batch; None: any model that takes channels-last.
    """
    # With one channel both formats have the same layout.
    images = x.dim() == 4 and x.shape[1] > 1
    if images and (model is None or takes_channels_last(model)):
        return torch.channels_last
    return torch.contiguous_format


def laid_out(x: Inputs, model: nn.Module) -> Inputs:
    """Converts a batch to the memory format for `model` (see `memory_format`)."""
    return map_inputs(x, lambda t: t.contiguous(memory_format=memory_format(t, model)))


def takes_channels_last(model: nn.Module, at: torch.device | None = None) -> bool:
    """Returns whether the faster channels-last format is safe for `model`.

    A bug in torch 2.13 makes it unsafe for some models. On processors without AVX-512, the backward
    pass of a strided 1x1 convolution with fewer than 8 input channels writes outside its memory.

    Args:
        model: the network.
        at: the device on which it will run; None: the device of the model.
    """
    at = at or device_of(model)
    if at.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return True
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels >= 8:
            continue
        if module.kernel_size == (1, 1) and module.stride != (1, 1):
            return False
    return True


def place_(model: nn.Module, at: torch.device | None = None) -> nn.Module:
    """Moves `model` to a device. Weights of Conv2d become channels-last if that is safe.

    Args:
        model: changed in place.
        at: the device; None: the result of `find()`.
    """
    at = at or find()
    # Weights and images must have the same format, or each convolution would convert one of them.
    wanted = torch.contiguous_format
    if takes_channels_last(model, at):
        wanted = torch.channels_last
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=wanted)
    return model.to(at)
