"""Measures peak memory, that is, how much a new process grows while it runs a model or file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fedpress.deploy.capture import capture, silence
from fedpress.deploy.examples import InputSpec, random_rows
from fedpress.deploy.runtime import array_call
from fedpress.deploy.timing import Runnable
from fedpress.errors import ExportError


def peak_memory(runnable: Runnable, given: InputSpec, *, batch: int = 1) -> int:
    """Returns the peak growth of a new process, in bytes, while it loads and runs `runnable` once.

    The runtime is imported first, so its own memory is not counted. A model runs as its captured
    graph, in eager torch.

    Args:
        runnable: a model, or the path of an exported file.
        given: shape of one float32 example, or a batch of inputs.
        batch: number of examples in the run.

    Raises:
        ExportError: if `runnable` cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(runnable, nn.Module):
            path = Path(folder) / "model.pt2"
            with silence():
                torch.export.save(capture(runnable, given), path)
        else:
            path = Path(runnable)
        # The batch is passed as a file, because another process cannot see our tensors.
        x = random_rows(given, batch)
        args, named = array_call(x)
        arrays = Path(folder) / "x.npz"
        np.savez(arrays, *args, *named.values())
        home = str(Path(__file__).parents[2])
        names = json.dumps([*named] or None)
        # -P keeps the working folder out of the import path. Otherwise a file onnxruntime.py in
        # that folder would be imported instead of the package.
        command = [sys.executable, "-P", "-c", _PROBE, str(path), str(arrays), names, home]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the process printed no reason"]
        what, cure = str(path), "export it again"
        if isinstance(runnable, nn.Module):
            what, cure = "the model", "run the model once on an example to see the error"
        raise ExportError(
            f"the memory of {what} cannot be measured: {lines[-1][:200]}",
            place="runnable",
            cure=cure,
        )
    return int(done.stdout.splitlines()[-1])


# Outside Linux the peak memory of a process cannot be reset. So this program first imports
# the runtime (for a model, it runs torch once), and reports only the growth after that.
_PROBE = """
import json, resource, sys
import numpy as np
path, names = sys.argv[1], json.loads(sys.argv[3])
sys.path.append(sys.argv[4])  # the folder of fedpress, in case it is not installed
arrays = np.load(sys.argv[2])
x = [arrays[name] for name in arrays.files]
def peak():
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
import torch
torch.set_num_threads(1)
from fedpress.deploy.formats import format_of, open_file
if path.endswith(".pt2"):
    torch.nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
else:
    for name in format_of(path).packages:
        __import__(name)
try:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak (Linux only)
except OSError:
    pass
try:
    before = now()
except OSError:
    before = peak()
def high():
    try:
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    except OSError:
        return peak()
if path.endswith(".pt2"):
    program = torch.export.load(path).module(check_guards=False)
    pairs = [np.concatenate([part] * 2) if len(part) == 1 else part for part in x]
    x = [torch.from_numpy(pair)[: len(part)] for pair, part in zip(pairs, x)]
    with torch.inference_mode():
        program(**dict(zip(names, x))) if names else program(*x)
else:
    session = open_file(path, threads=1)
    session.flat(**dict(zip(names, x))) if names else session.flat(*x)
print(max(0, high() - before))
"""
