"""Detects this machine's processor, and chooses the runtime options that the processor needs.

To add an option, add a row to `OPTIONS`. `open_file` sets the options that apply. The export and
measure stages record options and processor beside every latency, and beside every comparison with
the model's outputs (parity).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FEATURES = {
    # Our name: (its name in torch.cpu.get_capabilities, its name in /proc/cpuinfo).
    "avx2": ("avx2", "avx2"),
    "avx512": ("avx512_f", "avx512f"),
    "avx_vnni": ("avx_vnni", "avx_vnni"),
    "avx512_vnni": ("avx512_vnni", "avx512_vnni"),
    "amx_int8": ("amx_int8", "amx_int8"),
    "avx512_bf16": ("avx512_bf16", "avx512_bf16"),
    "amx_bf16": ("amx_bf16", "amx_bf16"),
    "dotprod": ("neon_dot", "asimddp"),
    "i8mm": ("i8mm", "i8mm"),
    "bf16": ("bf16", "bf16"),
}
# x86 instructions that sum products of 8-bit numbers in 32 bits.
VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}


@dataclass(frozen=True)
class Processor:
    """The processor that runs this process.

    Attributes:
        machine: instruction set, such as "x86_64" or "arm64".
        name: name of the product.
        cores: number of logical processors of this machine.
        features: instructions that the processor has, as keys of `FEATURES`.

    >>> Processor("x86_64", "an old one", 4, ("avx2",)).overflows
    True
    """

    machine: str
    name: str
    cores: int
    features: tuple[str, ...] = ()

    @property
    def is_x86(self) -> bool:
        """Whether the processor has the 64-bit x86 instruction set."""
        return self.machine.lower() in ("x86_64", "amd64")

    @property
    def overflows(self) -> bool:
        """Whether the processor sums two 8-bit products in 16 bits, which may overflow.

        This is so for x86 processors without VNNI instructions.
        """
        return self.is_x86 and not VNNI & set(self.features)


@dataclass(frozen=True)
class RuntimeOption:
    """One option of a runtime.

    Attributes:
        runtime: name of the runtime in `deploy.FORMATS`.
        option: name of the option in the runtime.
        value: the value to set.
        applies: function that says whether the option is needed. Its arguments are the processor,
            and whether integer kernels of the file read weights of more than 7 bits.
        why: the reason, in one sentence.
    """

    runtime: str
    option: str
    value: str
    applies: Callable[[Processor, bool], bool]
    why: str


OPTIONS: tuple[RuntimeOption, ...] = (
    RuntimeOption(
        "onnxruntime",
        "session.x64quantprecision",
        "1",
        lambda processor, wide: wide and processor.overflows,
        "without VNNI, sums of products with 8-bit weights overflow 16 bits; "
        "with VNNI the option changes no value and takes 2.6 times as long",
    ),
    RuntimeOption(
        "OpenVINO",
        "INFERENCE_PRECISION_HINT",
        "f32",
        lambda processor, wide: True,
        "else float layers are computed in bfloat16 on processors that have it",
    ),
    RuntimeOption(
        "OpenVINO",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE",
        "0",
        lambda processor, wide: True,
        "else the inputs of layers with packed weights are rounded to 8 bits if there is VNNI",
    ),
    RuntimeOption(
        "OpenVINO",
        "LP_TRANSFORMS_MODE",
        "NO",
        lambda processor, wide: wide and processor.overflows,
        "without VNNI, sums of products with 8-bit weights overflow 16 bits, and OpenVINO has no "
        "integer kernels that avoid this: the layers are computed in float",
    ),
)
"""All options. Runtimes without a row (ExecuTorch, LiteRT, torch) need none.

They compute in the precision of the file on every processor; the last bits of floats may differ.
"""


def options_for(runtime: str, *, wide: bool, processor: Processor | None = None) -> dict[str, str]:
    """Returns the options that `runtime` needs for a file, by name.

    Args:
        runtime: name of the runtime in `deploy.FORMATS`.
        wide: whether integer kernels of the file read weights of more than 7 bits.
        processor: the processor; None: the processor of this machine.
    """
    processor = processor or this_processor()
    found: dict[str, str] = {}
    for row in OPTIONS:
        if row.runtime == runtime and row.applies(processor, wide):
            found[row.option] = row.value
    return found


@cache
def this_processor() -> Processor:
    """Detects the processor of this machine."""
    # Sorted, so that records of two runs can be compared.
    features = tuple(sorted(_features()))
    return Processor(platform.machine(), _name(), os.cpu_count() or 1, features)


def conditions(runtime: str, *, threads: int, options: dict[str, str]) -> dict[str, Any]:
    """Returns the conditions of a measurement, as plain JSON values.

    Args:
        runtime: name of the runtime in `deploy.FORMATS`.
        threads: number of threads; 0: the runtime chose.
        options: the options that were set (see `options_for`).
    """
    here = this_processor()
    return {
        "runtime": runtime,
        "version": _version(runtime),
        "threads": threads,
        "options": options,
        "processor": here.name,
        "features": list(here.features),
    }


def as_json(processor: Processor) -> dict[str, Any]:
    """Returns a processor as plain JSON values."""
    return asdict(processor) | {"features": list(processor.features)}


# Name of a runtime -> name of the package whose version is recorded.
PACKAGES = {
    "onnxruntime": "onnxruntime",
    "OpenVINO": "openvino",
    "ExecuTorch": "executorch",
    "LiteRT": "ai-edge-litert",
    "torch": "torch",
}


def _version(runtime: str) -> str | None:
    # A measurement without a version is better than none.
    try:
        return version(PACKAGES[runtime])
    except (PackageNotFoundError, KeyError):
        return None


def _features() -> set[str]:
    # Older torch has no get_capabilities, and other systems than Linux have no /proc/cpuinfo.
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, Any] = get_capabilities() if get_capabilities is not None else {}
    flags = set(_cpuinfo("flags", "Features").split())
    features = set()
    for name, (torch_name, linux_name) in FEATURES.items():
        if found.get(torch_name) or linux_name in flags:
            features.add(name)
    return features


def _name() -> str:
    # x86 calls the entry "model name", and some ARM boards have "Model". Most ARM servers, and
    # other systems than Linux, have neither.
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """Returns the value of the first of `keys` that /proc/cpuinfo has; empty if it has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        # Each core has its own block with the same keys. The first block is used.
        values.setdefault(key.strip(), value.strip())
    return next((values[key] for key in keys if key in values), "")
