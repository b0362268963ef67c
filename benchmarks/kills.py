"""Kills of server, SuperLink and clients at random moments of deployed runs: python benchmarks/kills.py [KILLS] [SEED].

Starts a server and three clients with TLS and keys on this machine, kills one process after another with SIGKILL and
starts it again with the same command. Each run must end in the bits of the run that nobody disturbs, in one process.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = """
name = "kills"
[data]
source = "digits"
num_clients = 3
examples_per_client = 20
validation = 20
[model]
architecture = "cnn"
arguments = { in_channels = 1, image_size = 8 }
[[stage]]
kind = "federate"
num_rounds = 40
batch_size = 10
uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]
error_feedback = true
downlink = [{ kind = "quantize", bits = 8 }]
"""
FEDPRESS = [sys.executable, "-c", "from fedpress.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
CLIENTS = ("c0", "c1", "c2")
LONGEST = 900.0
"""Seconds that one run may take, kills and all."""


class Place:
    """A folder with a network, and the processes that run in it."""

    def __init__(self, folder: Path, port: int) -> None:
        """Makes keys and data."""
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "recipe.toml").write_text(RECIPE)
        names = ",".join(CLIENTS)
        self.do("network", "init", "--host", "localhost", "--clients", names, "--port", str(port))
        for name in CLIENTS:
            (folder / "network" / "clients" / name / "policy.toml").write_text('privacy = "none"')
        self.do("network", "split", "recipe.toml", "--out", "parts")
        self.do("run", "recipe.toml", "--out", "undisturbed")

    def do(self, *words: str) -> None:
        """Runs a command to its end."""
        done = subprocess.run(
            [*FEDPRESS, *words], cwd=self.folder, env=ENVIRONMENT, capture_output=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout.decode() + done.stderr.decode())

    def start(self, name: str, *words: str) -> None:
        """Starts a command; what it says is added to a file."""
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [*FEDPRESS, *words],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def start_client(self, name: str) -> None:
        """Starts a client."""
        self.start(
            name,
            "client",
            "--network",
            f"network/clients/{name}",
            "--data",
            f"parts/{name}.safetensors",
            "--ledger",
            f"network/clients/{name}/ledger.sqlite",
        )

    def start_server(self) -> None:
        """Starts the server."""
        self.start("server", "server", "recipe.toml", "--network", "network/server", "--out", "run")

    def kill(self, victim: str) -> bool:
        """Kills a process at once, and starts it again; returns whether it was there."""
        if victim == "superlink":
            found = superlinks(self.folder)
            for number in found:
                os.kill(number, 9)
            return bool(found)
        process = self.processes[victim]
        if process.poll() is not None:
            return False
        process.kill()
        process.wait()
        if victim == "server":
            self.start_server()
        else:
            self.start_client(victim)
        return True

    def close(self) -> None:
        """Ends all processes."""
        for process in self.processes.values():
            process.kill()
            process.wait()


def superlinks(folder: Path) -> list[int]:
    """Returns the SuperLinks that were started in `folder`."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                line = (place / "cmdline").read_bytes()
                there = (place / "cwd").readlink()
            except OSError:
                continue
            if b"fedpress.transport.flower.guard" in line and there == folder.resolve():
                found.append(int(place.name))
    return found


def disturbed(place: Place, chance: random.Random, most: int) -> dict[str, int]:
    """Does one run, with `most` kills at random moments; returns how often each was killed."""
    counts = dict.fromkeys(("server", "superlink", *CLIENTS), 0)
    shutil.rmtree(place.folder / "run", ignore_errors=True)
    place.start_server()
    end = time.monotonic() + LONGEST
    # Half of the victims are servers, since that is what resuming is about.
    victims = ("server", "server", "superlink", *CLIENTS)
    pause = chance.uniform(2, 8)
    next_kill = time.monotonic() + 10 + pause
    while place.processes["server"].poll() is None:
        if time.monotonic() > end:
            raise SystemExit(f"the run has not ended after {LONGEST:.0f} s; see {place.folder}")
        time.sleep(0.02)
        if time.monotonic() < next_kill or sum(counts.values()) >= most:
            continue
        victim = chance.choice(victims)
        if place.kill(victim):
            counts[victim] += 1
        # Beyond the time to start and connect, so that kills fall into rounds too.
        next_kill = time.monotonic() + chance.uniform(1, 25 if victim == "server" else 8)
    return counts


def main() -> None:
    """Kills, compares and prints."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    chance = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    place = Place(folder, int(os.environ.get("FEDPRESS_TEST_PORT", "24040")))
    model = Path("stages") / "0-federate" / "model.safetensors"
    true = (folder / "undisturbed" / model).read_bytes()
    total, same, runs = 0, 0, 0
    try:
        for name in CLIENTS:
            place.start_client(name)
        while total < wanted:
            began = time.monotonic()
            counts = disturbed(place, chance, min(10, wanted - total))
            status = place.processes["server"].returncode
            equal = not status and (folder / "run" / model).read_bytes() == true
            total, same, runs = total + sum(counts.values()), same + equal, runs + 1
            shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
            print(
                f"run {runs}: {time.monotonic() - began:.0f} s, killed {shown or 'nobody'}: "
                f"{'the same bits' if equal else f'OTHER BITS (exit {status})'}",
                flush=True,
            )
            if not equal:
                break
    finally:
        place.close()
    print(f"{total} kills in {runs} runs; {same} of {runs} runs ended in the same bits ({folder})")
    raise SystemExit(same != runs)


if __name__ == "__main__":
    main()
