"""Writes `environment.json`, which says where a run ran: versions, machine, commit and command."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fedpress
from fedpress.deploy.processor import as_json, this_processor
from fedpress.pipeline.result import read_finished
from fedpress.training.device import find
from fedpress.workspace import started
from fedpress.workspace.atomic import read_json, write_json_with_checksum
from fedpress.workspace.damage import CURES
from fedpress.workspace.folder import RunFolder

ROUNDING_FACTS = (
    "fedpress",
    "python",
    "torch",
    "numpy",
    "processor",
    "instructions",
    "device",
    "threads",
)
"""Facts that affect how sums are rounded. If one changes, a resumed run may give other bits."""
LIBRARIES = ("torch", "numpy", "safetensors", "dp-accounting", "onnx", "onnxruntime", "pydantic")
"""Packages whose versions are written."""


def write_environment(
    folder: RunFolder,
    command: str,
    origin: Mapping[str, Any] | None = None,
    *,
    device: torch.device | None = None,
) -> list[str]:
    """Writes `environment.json`; for a resumed run, appends what has changed since the start.

    Args:
        folder: folder of the run.
        command: the user's command, such as "fedpress run digits".
        origin: the keys "recipe" and "overrides", with what the user gave; only for a new run.
        device: device of the stages; None: the default of `fedpress.training.device.find`.

    Returns:
        Warnings for a resumed run that is not finished. There are two kinds. First: one of
        `ROUNDING_FACTS` has changed, so the last bits of the weights will differ from an
        uninterrupted run. Second: the file with the records of earlier rounds is missing.
    """
    path, now = folder.path / "environment.json", environment(command, device)
    warnings: list[str] = []
    # The first entry is never changed: a resumed run appends the facts that differ.
    if path.exists():
        first = read_json(path, cure=CURES[path.name])
        changed = {key: value for key, value in now.items() if first.get(key) != value}
        # A finished run computes nothing more, so no warning is needed.
        if not read_finished(folder):
            warnings = [*_other_bits(first, now), *folder.records.warnings()]
        now = {**first, "resumed": [*_list(first.get("resumed")), changed]}
    else:
        now |= origin or {}
        text = folder.path / "recipe.toml"
        # With the signature this user can resume the run without `--allow-code` for its functions.
        if text.exists() and (names := started.functions_of(text.read_text("utf-8"))):
            now["started_by"] = started.sign(names, now.get("recipe"))
    write_json_with_checksum(path, now, folder.path)
    return warnings


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _other_bits(first: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a list with a warning if sums may be rounded differently than before; else []."""
    earlier = [first]
    for change in _list(first.get("resumed")):
        if isinstance(change, dict):
            earlier.append(first | change)
    differ = []
    for key in ROUNDING_FACTS:
        # Older versions did not write every fact. A missing fact is not a change.
        known = list(dict.fromkeys(_name(e[key]) for e in earlier if e.get(key) is not None))
        if known and known != [_name(now.get(key))]:
            differ.append(f"{key} {', '.join(known)} before, {_name(now.get(key))} now")
    if not differ:
        return []
    return [
        f"this run was begun under other conditions ({'; '.join(differ)}): it continues, but "
        "its bits will differ from those of an uninterrupted run"
    ]


def _name(value: Any) -> str:
    """Returns the name of a processor (a dictionary), or the text of any other fact."""
    return str(value.get("name")) if isinstance(value, dict) else str(value)


def environment(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """Returns versions, machine, device, commit and command, as `environment.json` has them."""
    return {
        "fedpress": fedpress.__version__,
        "python": platform.python_version(),
        # Installed versions, without importing the libraries, which takes seconds.
        **{name: version(name) for name in LIBRARIES},
        "machine": machine(),
        "processor": as_json(this_processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": _device_name(device or find()),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "command": command,
    }


def _device_name(device: torch.device) -> str:
    """Returns the model of a CUDA GPU (rounding differs by model); for other devices the type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _processor() -> str:
    # On Linux `platform.processor()` is often empty, so /proc/cpuinfo is read first.
    try:
        cpu = next(
            x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")
        )
        return cpu.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> str:
    """Describes this machine: processor, cores, GPU and system, such as "..., 2 cores, Linux".

    The number of cores is that of logical processors.
    """
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{_processor()}, {os.cpu_count()} cores{gpu}, {platform.system()}"


def _commit() -> str | None:
    """Returns the commit of the source, with `-dirty` if files are changed; None without git."""
    root = Path(fedpress.__file__).parent.parent
    # Without this check, git would report the repository of a user whose folder contains fedpress.
    if not (root / ".git").exists():
        return None
    try:
        # Both at the same time: each needs some hundredths of a second.
        with (
            _git(root, "describe", "--always", "--abbrev=10") as describe,
            # Not `describe --dirty`: it writes the repository's index, and would leave a lock
            # behind if it were killed then, for instance because the disk is full.
            _git(root, "status", "--porcelain", "--untracked-files=no") as status,
        ):
            commit, changed = _output(describe), _output(status)
    # git is not installed, too slow, or refuses a folder of another user. The run goes on.
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit


@contextmanager
def _git(root: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a command of git, which writes nothing in the repository; ends it after the block."""
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.kill()  # does nothing if it has ended


def _output(process: subprocess.Popen[str]) -> str:
    """Returns what a command of git has printed.

    Raises:
        SubprocessError: if it takes longer than 10 s, or fails.
    """
    printed, _ = process.communicate(timeout=10)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return printed.strip()
