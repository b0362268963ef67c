"""What a runtime must be told on this processor, a table: asked at start, recorded beside every latency and parity.

To add a setting: one row of `SETTINGS`. `open_file` passes the rows that apply to the runtime; the export and measure
stages write them down with the processor's name.
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
    # our name: (the name of torch.cpu.get_capabilities, that of /proc/cpuinfo)
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
VNNI = {"avx_vnni", "avx512_vnni", "amx_int8"}


@dataclass(frozen=True)
class Processor:
    """The processor that runs this process.

    Attributes:
        machine: kind of instructions, such as "x86_64" or "arm64".
        name: as its maker calls it.
        cores: how many this machine has.
        features: those of `FEATURES` that it has.

    >>> Processor("x86_64", "an old one", 4, ("avx2",)).overflows
    True
    """

    machine: str
    name: str
    cores: int
    features: tuple[str, ...] = ()

    @property
    def is_x86(self) -> bool:
        """Whether it runs x86 instructions of 64 bits."""
        return self.machine.lower() in ("x86_64", "amd64")

    @property
    def overflows(self) -> bool:
        """Whether two products of bytes are added in 16 bits: x86 without VNNI (`vpmaddubsw`)."""
        return self.is_x86 and not VNNI & set(self.features)


@dataclass(frozen=True)
class Setting:
    """One option of a runtime.

    Attributes:
        runtime: as `deploy.FORMATS` calls it.
        option: its name in the runtime.
        value: what it is set to.
        applies: whether it is needed, by the processor and by whether the file holds weights of 8 bits that integer
            kernels read.
        why: one sentence for people.
    """

    runtime: str
    option: str
    value: str
    applies: Callable[[Processor, bool], bool]
    why: str


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "onnxruntime", "session.x64quantprecision", "1",
        lambda processor, wide: wide and processor.overflows,
        "8-bit weights overflow in 16 bits without VNNI; with VNNI the option changes no value and takes 2.6 times as "
        "long",
    ),
    Setting(
        "OpenVINO", "INFERENCE_PRECISION_HINT", "f32",
        lambda processor, wide: True,
        "else float layers are computed in bfloat16 on processors that have it",
    ),
    Setting(
        "OpenVINO", "DYNAMIC_QUANTIZATION_GROUP_SIZE", "0",
        lambda processor, wide: True,
        "else the inputs of layers with packed weights are rounded to bytes on processors with VNNI",
    ),
    Setting(
        "OpenVINO", "LP_TRANSFORMS_MODE", "NO",
        lambda processor, wide: wide and processor.overflows,
        "8-bit weights overflow in 16 bits without VNNI, and OpenVINO has no exact integers: they are computed in "
        "float",
    ),
)  # fmt: skip
"""What runtimes are told. A runtime without a row (ExecuTorch, LiteRT, torch) computes the same on every processor."""


def settings(runtime: str, *, wide: bool, processor: Processor | None = None) -> dict[str, str]:
    """Returns the options of `runtime` for a file, by name.

    Args:
        runtime: as `deploy.FORMATS` calls it.
        wide: whether integer kernels of the file read weights beyond 7 bits.
        processor: that of this machine by default.
    """
    where = processor or this_processor()
    return {s.option: s.value for s in SETTINGS if s.runtime == runtime and s.applies(where, wide)}


@cache
def this_processor() -> Processor:
    """Asks the machine what it has."""
    return Processor(platform.machine(), _name(), os.cpu_count() or 1, tuple(sorted(_features())))


def conditions(runtime: str, *, threads: int, options: dict[str, str]) -> dict[str, Any]:
    """Returns under which conditions something was measured, as plain JSON values.

    Args:
        runtime: as `deploy.FORMATS` calls it.
        threads: how many it computed on; 0: as the runtime likes.
        options: what it was told (`settings`).
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


PACKAGES = {
    "onnxruntime": "onnxruntime",
    "OpenVINO": "openvino",
    "ExecuTorch": "executorch",
    "LiteRT": "ai-edge-litert",
    "torch": "torch",
}


def _version(runtime: str) -> str | None:
    try:
        return version(PACKAGES[runtime])
    except (PackageNotFoundError, KeyError):
        return None


def _features() -> set[str]:
    ask = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, Any] = ask() if ask is not None else {}
    flags = set(_cpuinfo("flags", "Features").split())
    return {
        name for name, (torchs, linux) in FEATURES.items() if found.get(torchs) or linux in flags
    }


def _name() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str:
    """The first line of /proc/cpuinfo under one of `keys`; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    pairs = [
        (key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)
    ]
    return next((value for wanted in keys for key, value in pairs if key == wanted), "")
