"""What a network adds to a round: fedpress over Flower's wire, beside official Flower nodes.

    python benchmarks/deployment.py --rounds 20 --parts loopback tls secure large idle flower

Each part runs real processes on loopback: a SuperLink, a server and two clients. `loopback`, `tls` and `secure` train
a small model on 20 digits a client, so that nearly all of a round is the network's; the same recipe in one process is
run beside them and subtracted. `large` sends 45 MB each way. `idle` is the share of a core that a waiting client
takes. `flower` runs two official SuperNodes with a client that does nothing. Printed: median, smallest and largest
round in seconds, without the first.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fedpress.deploy.processor import this_processor
from fedpress.transport.flower.pinned import QUIET

FEDPRESS = [sys.executable, "-m", "fedpress"]
CLIENTS = ("c0", "c1")
SMALL = 'architecture = "mlp"\narguments = { in_features = 64, hidden = [16] }'
LARGE = 'architecture = "mlp"\narguments = { in_features = 64, hidden = [3200, 3200, 256] }'
RECIPE = """
name = "deployment"
[data]
source = "digits"
num_clients = 2
examples_per_client = 20
validation = 20
[model]
{model}
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 20
{more}
"""
SECURE = (
    (
        "secure_keys = true\nmax_dropout = 0.0\n"
        'privacy = {{ unit = "client", trust = "distributed", noise_multiplier = 2.0, delta = 1e-3 }}'
    )
    .replace("{{", "{")
    .replace("}}", "}")
)
APP = {
    "pyproject.toml": """
[project]
name = "idle"
version = "0.1.0"
description = ""
license = { file = "LICENSE" }
dependencies = ["flwr>=1.42.0"]
[tool.flwr.app]
publisher = "nobody"
fab-format-version = 1
flwr-version-target = "1.42.0"
[tool.flwr.app.components]
serverapp = "idle.server:app"
clientapp = "idle.client:app"
[tool.flwr.app.config]
rounds = ROUNDS
""",
    "LICENSE": "Apache-2.0\n",
    "idle/__init__.py": "",
    "idle/client.py": """
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()
@app.train()
def train(msg, context):
    arrays = ArrayRecord([np.zeros(1200, np.float32)])
    return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 20})}), reply_to=msg)
""",
    "idle/server.py": """
import time
import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
app = ServerApp()
@app.main()
def main(grid, context):
    def mark(server_round, arrays):
        with open("MARKS", "a") as file:
            file.write(f"{time.time()}\\n")
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=ArrayRecord([np.zeros(1200, np.float32)]),
        num_rounds=int(context.run_config["rounds"]), evaluate_fn=mark)
""",
}


def main() -> None:
    """Measures the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("loopback", "tls", "secure", "large", "idle", "flower")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--port", type=int, default=19000)
    given = parser.parse_args()
    print(f"{this_processor()}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in given.parts:
            measure(part, folder / part, given.rounds, given.port)


def measure(part: str, folder: Path, rounds: int, port: int) -> None:
    """Measures and prints one part."""
    folder.mkdir()
    if part == "flower":
        show("official Flower nodes", official(folder, min(rounds, 5), port))
        return
    if part == "idle":
        print(f"a waiting client: {idle(folder, port):.2%} of a core")
        return
    model, more = (LARGE, "") if part == "large" else (SMALL, SECURE if part == "secure" else "")
    text = RECIPE.format(model=model, rounds=rounds if part != "large" else 6, more=more)
    (folder / "recipe.toml").write_text(text)
    run([*FEDPRESS, "run", "recipe.toml", "--out", "local"], folder)
    run([*FEDPRESS, "network", "split", "recipe.toml", "--out", "data"], folder)
    local = seconds_of(folder / "local")
    far = deployed(folder, port, tls=part in ("tls", "secure"))
    show(f"{part}: in one process", local)
    show(f"{part}: over the network", far)
    over = statistics.median(far) - statistics.median(local)
    print(f"{part}: the network adds {over:.2f} s a round (median)")


def deployed(folder: Path, port: int, *, tls: bool) -> list[float]:
    """Returns the seconds of the rounds with a server and two clients as processes."""
    where = ["--insecure", "--port", str(port)]
    if tls:
        names = ",".join(CLIENTS)
        init = ["network", "init", "--host", "127.0.0.1", "--port", str(port), "--clients", names]
        run([*FEDPRESS, *init], folder)
        where = ["--network", "network/server"]
    clients = [client(folder, name, port, tls=tls) for name in CLIENTS]
    try:
        count = ["--min-clients", str(len(CLIENTS))]
        run([*FEDPRESS, "server", "recipe.toml", *where, *count, "--out", "far"], folder)
    finally:
        for one in clients:
            one.send_signal(signal.SIGTERM)
            one.wait(20)
    return seconds_of(folder / "far")


def client(folder: Path, name: str, port: int, *, tls: bool) -> subprocess.Popen[bytes]:
    """Starts a client."""
    where = ["--insecure", "--server", f"127.0.0.1:{port}", "--name", name]
    if tls:
        where = ["--network", f"network/clients/{name}"]
    policy = folder / "policy.toml"
    policy.write_text('privacy = "none"\n')
    words = [*FEDPRESS, "client", "--data", f"data/{name}.safetensors", "--policy", str(policy)]
    words += where
    with (folder / f"{name}.log").open("wb") as out:
        return subprocess.Popen(words, cwd=folder, stdout=out, stderr=out, env=environment(folder))


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of all processes: one thread, and a ledger of their own."""
    home = {"XDG_DATA_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **QUIET, **home}


def run(words: list[str], folder: Path) -> None:
    """Runs a command to its end; shows what it said if it fails."""
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def seconds_of(place: Path) -> list[float]:
    """Returns the seconds of each round of a run, without the first."""
    lines = (place / "records.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record["seconds"] for record in records if "seconds" in record and "round" in record][
        1:
    ]


def idle(folder: Path, port: int, seconds: float = 60.0) -> float:
    """Returns the share of a core that a client takes while nobody asks it anything."""
    (folder / "recipe.toml").write_text(RECIPE.format(model=SMALL, rounds=1, more=""))
    run([*FEDPRESS, "network", "split", "recipe.toml", "--out", "data"], folder)
    waiting = client(folder, CLIENTS[0], port, tls=False)
    # A server that waits for a second client: the first one is connected and asked for nothing.
    words = [*FEDPRESS, "server", "recipe.toml", "--insecure", "--port", str(port)]
    server = subprocess.Popen(
        [*words, "--min-clients", "2"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Long enough that the polls have become rare.
        time.sleep(seconds)
        before = processor_seconds(waiting.pid)
        time.sleep(seconds)
        return (processor_seconds(waiting.pid) - before) / seconds
    finally:
        for one in (server, waiting):
            one.send_signal(signal.SIGTERM)
            one.wait(20)


def processor_seconds(pid: int) -> float:
    """Returns the processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def official(
    folder: Path,
    rounds: int,
    port: int,
    *,
    host: str = "127.0.0.1",
    namespaces: Sequence[str] = ("", "", ""),
) -> list[float]:
    """Returns the seconds of the rounds of official SuperNodes, all defaults.

    Args:
        folder: an empty folder.
        rounds: how many.
        port: of the SuperLink; the nodes take the ports above it.
        host: address of the SuperLink.
        namespaces: network namespace of the server and of each node; "" is this one.
    """
    inside = [["ip", "netns", "exec", name] if name else [] for name in namespaces]
    for name, text in APP.items():
        path = folder / "app" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        marks = text.replace("MARKS", str(folder / "marks")).replace("ROUNDS", str(rounds))
        path.write_text(marks)
    home = folder / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "{host}:{port}"\n'
        "insecure = true\n"
    )
    bin_folder = Path(sys.executable).parent
    tools = {}
    for name in ("flower-superlink", "flower-supernode", "flwr"):
        found = shutil.which(name, path=f"{bin_folder}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            sys.exit(f"{name} is not installed")
        tools[name] = found
    env = {**environment(folder), "FLWR_HOME": str(home)}
    with (folder / "log").open("wb") as out:
        options = {"cwd": folder, "env": env, "stdout": out, "stderr": out, "process_group": 0}
        words = [*inside[0], tools["flower-superlink"], "--insecure"]
        words += ["--host", host, "--port", str(port)]
        started = [subprocess.Popen(words, **options)]  # type: ignore[call-overload]
        time.sleep(8)
        for at, prefix in enumerate(inside[1:]):
            words = [*prefix, tools["flower-supernode"], "--insecure"]
            words += ["--superlink", f"{host}:{port}"]
            words += ["--host", "127.0.0.1", "--port", str(port + 100 + at)]
            started.append(subprocess.Popen(words, **options))  # type: ignore[call-overload]
        try:
            words = [*inside[0], tools["flwr"], "run", "app", "loop", "--stream"]
            subprocess.run(
                words, cwd=folder, env=env, stdout=out, stderr=out, timeout=300, check=True
            )
        finally:
            for one in started:
                os.killpg(one.pid, signal.SIGKILL)
    marks = [float(line) for line in (folder / "marks").read_text().split()]
    return [after - before for before, after in itertools.pairwise(marks)]


def show(what: str, seconds: list[float]) -> None:
    """Prints median, smallest and largest."""
    middle = statistics.median(seconds)
    print(f"{what}: {middle:.2f} s a round ({min(seconds):.2f} to {max(seconds):.2f})", flush=True)


if __name__ == "__main__":
    main()
