"""Time of the offer and peak memory of a deployed run with one client: python benchmarks/deployed_memory.py [MB ...].

Server, SuperLink and client run on this machine without TLS; the model is a perceptron of MB megabytes, two rounds.
Prints for each model what the client's answer to an offer took, and the peak of resident memory of each process.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kills

RECIPE = """
name = "memory"
[data]
source = "digits"
num_clients = 1
examples_per_client = 20
validation = 20
[model]
architecture = "mlp"
arguments = {{ in_features = 64, hidden = [{width}, {width}] }}
[[stage]]
kind = "federate"
num_rounds = 2
batch_size = 10
"""


def peak(process: int) -> float:
    """Returns the largest resident memory of a process so far, in MB."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    return 0.0


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """Starts a command of fedpress; what it says is written to a file."""
    with (folder / f"{name}.log").open("wb") as out:
        return subprocess.Popen(
            [*kills.FEDPRESS, *words],
            cwd=folder,
            env=kills.ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def measure(megabytes: float, port: int) -> None:
    """Does one run, and prints what it took."""
    folder = Path(tempfile.mkdtemp(prefix="memory-"))
    width = round((megabytes * 1e6 / 4) ** 0.5)
    (folder / "recipe.toml").write_text(RECIPE.format(width=width))
    began = time.monotonic()
    start(folder, "split", "network", "split", "recipe.toml", "--out", "parts").wait()
    data = ["--data", "parts/c0.safetensors", "--ledger", "ledger.sqlite"]
    here = ["--insecure", "--name", "c0", "--server", f"localhost:{port}"]
    client = start(folder, "client", "client", *data, *here)
    server = start(
        folder, "server", "server", "recipe.toml", "--insecure", "--port", str(port), "--out", "run"
    )
    peaks: dict[str, float] = {}
    try:
        while server.poll() is None:
            for number, name in [(server.pid, "server"), (client.pid, "client")]:
                peaks[name] = max(peaks.get(name, 0.0), peak(number))
            for number in kills.superlinks(folder):
                peaks["SuperLink"] = max(peaks.get("SuperLink", 0.0), peak(number))
            if client.poll() is not None:
                raise SystemExit((folder / "client.log").read_text())
            time.sleep(0.1)
    finally:
        client.terminate()
        client.wait()
        if server.poll() is None:
            server.terminate()
            server.wait()
    if server.returncode:
        raise SystemExit((folder / "server.log").read_text())
    said = (folder / "client.log").read_text()
    answers = re.findall(r"answered in ([\d.]+) s \(([\d,]+) bytes", said)
    # The first two are offers: one before the run, to see who accepts, and the real one.
    large = [f"{seconds} s ({count})" for seconds, count in answers if len(count) > 9]
    print(f"{megabytes:.0f} MB, {time.monotonic() - began:.0f} s; answers to {', '.join(large)}")
    shown = ", ".join(f"{name} {value:.0f}" for name, value in peaks.items())
    print(f"  peak MB: {shown}", flush=True)


def main() -> None:
    """Measures each size."""
    for at, word in enumerate(sys.argv[1:] or ["1", "39", "79"]):
        measure(float(word), 26240 + at)


if __name__ == "__main__":
    main()
