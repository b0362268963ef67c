"""Seconds from the start of a process to `fedpress run RECIPE`'s first training step, beside `import torch`.

Each time is that of a new process, from just before it is started; the first one of each kind fills
the disk cache and compiles files, and is not counted. The kinds take turns, so that a change in the
machine's load meets all of them. The ratio is of medians; the spread is the interquartile range.
"First step" is the end of the first `Optimizer.step`. Processor seconds are given too: they change
less with the load, and include a second process that checks later stages (`pipeline/check_beside`)
only if it has ended before.

    OMP_NUM_THREADS=1 python benchmarks/start.py [--recipe digits] [--runs 10] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_STEP = """
import os, sys, time

class Hook:
    # Sets the hook when torch has been imported, which the command line does in its own way.
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "fedpress.training.fit":
            sys.meta_path.remove(cls)
            from torch.optim.optimizer import register_optimizer_step_post_hook
            register_optimizer_step_post_hook(stop)

def stop(*_):
    used = os.times()
    sys.__stderr__.write(f"STEP {time.time()} {used.user + used.system}\\n")
    sys.__stderr__.flush()
    os._exit(0)

sys.meta_path.insert(0, Hook)
from fedpress.cli import main
main()
"""
"""The command line, with a hook behind the first step."""

IMPORT = """
import os, sys, time
import torch
used = os.times()
sys.stderr.write(f"STEP {time.time()} {used.user + used.system}\\n")
"""


def main() -> None:
    """Measures all kinds in turn and prints a table."""
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--recipe", default="digits")
    words.add_argument("--runs", type=int, default=10)
    words.add_argument("--json", action="store_true")
    asked = words.parse_args()
    kinds = {
        "import torch": ["-c", IMPORT],
        f"first step of {asked.recipe}": ["-c", FIRST_STEP, "run", asked.recipe, "--out", "RUN"],
        "fedpress --help": ["-m", "fedpress", "--help"],
        f"fedpress check {asked.recipe}": ["-m", "fedpress", "check", asked.recipe],
    }
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for turn in range(asked.runs + 1):
        for kind, command in kinds.items():
            found = timed(command)
            if turn:
                times[kind].append(found)
    limit = statistics.median(wall for wall, _ in times["import torch"])
    rows = [row(kind, found, limit) for kind, found in times.items()]
    if asked.json:
        print(json.dumps({"processor": platform.processor(), "rows": rows}))
        return
    print(f"{asked.runs} runs, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'all')}")
    print(f"{'':28}{'seconds':>9}{'spread':>8}{'ratio':>7}{'processor':>11}")
    for one in rows:
        print(
            f"{one['kind']:28}{one['seconds']:9.2f}{one['spread']:8.2f}{one['ratio']:7.2f}"
            f"{one['processor_seconds']:11.2f}"
        )


def row(kind: str, found: list[tuple[float, float]], limit: float) -> dict[str, str | float]:
    """Returns median and spread of one kind, and its ratio to the median of `import torch`."""
    walls = [wall for wall, _ in found]
    low, middle, high = statistics.quantiles(walls, n=4) if len(walls) > 1 else walls * 3
    return {
        "kind": kind,
        "seconds": middle,
        "spread": high - low,
        "ratio": middle / limit,
        "processor_seconds": statistics.median(used for _, used in found),
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Runs Python with these arguments; returns seconds and processor seconds.

    A command that prints "STEP TIME USED" is timed until then, another one until its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [str(Path(folder) / "run") if word == "RUN" else word for word in command]
        before = os.times()
        start = time.time()
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, check=True, cwd=folder
        )
        end = time.time()
        after = os.times()
    for line in done.stderr.splitlines():
        if line.startswith("STEP "):
            _, at, used = line.split()
            return float(at) - start, float(used)
    spent = after.children_user - before.children_user
    return end - start, spent + after.children_system - before.children_system


if __name__ == "__main__":
    main()
