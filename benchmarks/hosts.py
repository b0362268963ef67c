"""Deployments across hosts with bad lines: network namespaces, each with an address and a cable.

    sudo python benchmarks/hosts.py --parts even line delay cut slow

One server and three clients with TLS and keys. `even`: nothing is in the way. `line`: every cable
carries 10 Mbit/s (tbf); an update of 8 bits beside one of float32, and official Flower nodes
beside both. `delay`: everything to and from client c2 arrives 100 ms late, so a question and its
answer take 200 ms longer (a relay process; the kernel may lack netem). `cut`: the cable of c0 is
pulled in a round for a minute and plugged in again. `slow`: client c2 computes ten times slower
(it is stopped nine tenths of the time); synchronous rounds beside buffered ones, seconds to the
same accuracy. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deployment
from deployment import FEDPRESS, environment, run, seconds_of, show

from fedpress.deploy.processor import this_processor

PORT = 9443
SERVER = "10.77.0.1"
SECOND = "10.77.0.254"
"""The server's other address: a relay in a client's namespace stands for the first."""
CLIENTS = ("c0", "c1", "c2")
RATE = "10mbit"
WIDTH = 2048
"""Of the hidden layers on slow lines: 4.3 M values, so that the line is what a round waits for."""
RECIPE = """
name = "hosts"
seed = {seed}
[data]
source = "digits"
num_clients = 3
examples_per_client = {examples}
validation = 200
[model]
architecture = "mlp"
arguments = {{ in_features = 64, hidden = {hidden} }}
[[stage]]
kind = "federate"
num_rounds = {rounds}
batch_size = 20
{more}
"""
CODED = 'uplink = [{ kind = "quantize", bits = 8 }]\ndownlink = [{ kind = "quantize", bits = 8 }]'
SLOW = "epochs = 15\nlr = 0.00066\n"
BUFFERED = 'schedule = { kind = "buffered", buffer = 2 }\n'
ACCURACY = 0.9


class Hosts:
    """A namespace for the server, with a bridge, and one for each client, with a cable to it."""

    def __init__(self) -> None:
        """Makes them; `close` removes them."""
        self.names = ["fp-server", *(f"fp-{name}" for name in CLIENTS)]
        self.close()
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", "fp-server", "link", "add", "bridge", "type", "bridge")
        for address in (SERVER, SECOND):
            ip("-n", "fp-server", "addr", "add", f"{address}/24", "dev", "bridge")
        ip("-n", "fp-server", "link", "set", "bridge", "up")
        for at, name in enumerate(CLIENTS):
            cable = ["link", "add", f"to-{name}", "netns", "fp-server", "type", "veth"]
            ip(*cable, "peer", "name", "eth0", "netns", f"fp-{name}")
            ip("-n", "fp-server", "link", "set", f"to-{name}", "master", "bridge", "up")
            ip("-n", f"fp-{name}", "addr", "add", f"10.77.0.{10 + at}/24", "dev", "eth0")
            ip("-n", f"fp-{name}", "link", "set", "eth0", "up")

    @contextmanager
    def slow_lines(self) -> Iterator[None]:
        """Lets every cable carry `RATE` in each direction."""
        ends = [("fp-server", f"to-{name}") for name in CLIENTS]
        ends += [(f"fp-{name}", "eth0") for name in CLIENTS]
        shape = ["root", "tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms"]
        for host, end in ends:
            ip("netns", "exec", host, "tc", "qdisc", "add", "dev", end, *shape)
        try:
            yield
        finally:
            for host, end in ends:
                ip("netns", "exec", host, "tc", "qdisc", "del", "dev", end, "root")

    @contextmanager
    def late(self, name: str, seconds: float) -> Iterator[None]:
        """Delays whatever client `name` sends or receives.

        A relay in its namespace has the server's address, so the certificate is right.
        """
        host = f"fp-{name}"
        ip("-n", host, "addr", "add", f"{SERVER}/32", "dev", "lo")
        words = ["ip", "netns", "exec", host, sys.executable, __file__, "--relay", str(seconds)]
        relay = subprocess.Popen(words)
        time.sleep(1.0)
        try:
            yield
        finally:
            relay.kill()
            relay.wait()
            ip("-n", host, "addr", "del", f"{SERVER}/32", "dev", "lo")

    def plug(self, name: str, *, there: bool) -> None:
        """Plugs in or pulls the cable of client `name`."""
        ip("-n", "fp-server", "link", "set", f"to-{name}", "up" if there else "down")

    def close(self) -> None:
        """Removes the namespaces, and what lies in them."""
        for name in self.names:
            done = subprocess.run(["ip", "netns", "del", name], capture_output=True)
            while not done.returncode and Path(f"/run/netns/{name}").exists():
                time.sleep(0.05)


def ip(*words: str) -> None:
    """Runs a command of iproute2."""
    subprocess.run(["ip", *words], check=True)


async def relay(seconds: float) -> None:
    """Passes bytes on to the server, `seconds` after they have come."""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def send() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    break
                writer.write(data)
                await writer.drain()
            writer.close()

        sending = asyncio.create_task(send())
        data = b"-"
        while data:
            # Whoever breaks off the connection ends both directions.
            try:
                data = await reader.read(1 << 16)
            except ConnectionError:
                data = b""
            await waiting.put((time.monotonic() + seconds, data))
        await sending

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(SECOND, PORT)
        except OSError:
            # The server is not up yet.
            writer.close()
            return
        await asyncio.gather(
            late(reader, far_writer), late(far_reader, writer), return_exceptions=True
        )

    listening = await asyncio.start_server(both, SERVER, PORT)
    await listening.serve_forever()


class Place:
    """A folder with a network, one recipe, and its data."""

    def __init__(self, folder: Path, **recipe: object) -> None:
        """Writes the recipe, keys and data; `recipe`: fields of `RECIPE`."""
        self.folder = folder
        folder.mkdir()
        given = {"seed": 0, "examples": 20, "hidden": [16], "rounds": 10, "more": "", **recipe}
        (folder / "recipe.toml").write_text(RECIPE.format(**given))
        (folder / "policy.toml").write_text('privacy = "none"\n')
        init = ["network", "init", "--host", SERVER, "--port", str(PORT)]
        run([*FEDPRESS, *init, "--clients", ",".join(CLIENTS)], folder)
        run([*FEDPRESS, "network", "split", "recipe.toml", "--out", "data"], folder)

    def start(self, host: str, log: str, *words: str) -> subprocess.Popen[bytes]:
        """Starts a command on a host."""
        with (self.folder / log).open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", host, *FEDPRESS, *words],
                cwd=self.folder,
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def deploy(
        self,
        out: str = "far",
        meanwhile: Callable[[Path, dict[str, subprocess.Popen[bytes]]], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Runs the recipe across the hosts, and returns the records of its rounds.

        Args:
            out: name of the run folder.
            meanwhile: runs in a thread beside it, with the run folder and the clients' processes.
        """
        clients = {}
        for name in CLIENTS:
            words = ["client", "--network", f"network/clients/{name}", "--policy", "policy.toml"]
            words += ["--data", f"data/{name}.safetensors"]
            clients[name] = self.start(f"fp-{name}", f"{name}.log", *words)
        words = ["server", "recipe.toml", "--network", "network/server", "--out", out]
        server = self.start("fp-server", "server.log", *words, "--min-clients", str(len(CLIENTS)))
        beside = threading.Thread(
            target=meanwhile or (lambda folder, clients: None),
            args=(self.folder / out, clients),
            daemon=True,
        )
        beside.start()
        try:
            if server.wait(900):
                sys.exit((self.folder / "server.log").read_text())
        finally:
            server.kill()
            for one in clients.values():
                one.send_signal(signal.SIGCONT)
                one.send_signal(signal.SIGTERM)
                one.wait(120)
        return records_of(self.folder / out)


def records_of(place: Path) -> list[dict[str, Any]]:
    """Returns the records of the rounds of a run, as far as it has come."""
    path = place / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in records if "round" in record]


def even(hosts: Hosts, folder: Path) -> None:
    """Rounds with nothing in the way."""
    place = Place(folder)
    place.deploy()
    show("even lines", seconds_of(place.folder / "far"))


def line(hosts: Hosts, folder: Path) -> None:
    """Rounds on slow lines: does a shorter message take as much less time as it has fewer bytes?"""
    folder.mkdir()
    found = {}
    with hosts.slow_lines():
        for name, more in {"float32": "", "8 bits": CODED}.items():
            place = Place(folder / name.split()[0], hidden=[WIDTH, WIDTH], rounds=5, more=more)
            records = place.deploy()
            seconds = seconds_of(place.folder / "far")
            show(f"{RATE}: {name}", seconds)
            sent = [int(r["bytes_up"]) + int(r["bytes_down"]) for r in records[1:]]
            found[name] = statistics.median(seconds), statistics.median(sent)
        official(hosts, folder / "official")
    (long, much), (short, little) = found["float32"], found["8 bits"]
    print(f"{RATE}: bytes {much / little:.2f} times fewer, seconds {long / short:.2f} times fewer")


def official(hosts: Hosts, folder: Path) -> None:
    """Official Flower nodes with as many float32 values on the same lines."""
    values = 65 * WIDTH + (WIDTH + 1) * WIDTH + (WIDTH + 1) * 10
    apps = {}
    for name, text in deployment.APP.items():
        # New numbers in every message: Flower sends equal arrays once.
        text = text.replace("np.zeros(1200, np.float32)", f"np.random.randn({values}).astype('f')")
        apps[name] = text
    before, deployment.APP = deployment.APP, apps
    folder.mkdir()
    try:
        ends = [f"fp-{name}" for name in CLIENTS]
        seconds = deployment.official(folder, 5, PORT, host=SERVER, namespaces=["fp-server", *ends])
    finally:
        deployment.APP = before
    show(f"{RATE}: official Flower nodes, float32", seconds)


def delay(hosts: Hosts, folder: Path) -> None:
    """Rounds with one host far away."""
    place = Place(folder)
    with hosts.late("c2", 0.1):
        place.deploy()
    show("c2 is 200 ms away", seconds_of(place.folder / "far"))


def cut(hosts: Hosts, folder: Path) -> None:
    """A minute without c0."""
    place = Place(folder, rounds=300)
    run([*FEDPRESS, "run", "recipe.toml", "--out", "near"], place.folder)
    times: list[float] = []

    def pull(out: Path, clients: dict[str, subprocess.Popen[bytes]]) -> None:
        while len(records_of(out)) < 5:
            time.sleep(0.1)
        hosts.plug("c0", there=False)
        times.append(time.time())
        time.sleep(60)
        hosts.plug("c0", there=True)
        times.append(time.time())

    records = place.deploy(meanwhile=pull)
    alone = [r for r in records if "c0" not in {c["client"] for c in r["clients"]}]
    seconds = [float(r["seconds"]) for r in records]
    model = Path("stages") / "0-federate" / "model.safetensors"
    same = (place.folder / "far" / model).read_bytes() == (
        place.folder / "near" / model
    ).read_bytes()
    print(
        f"cut for a minute: {len(records)} rounds, longest {max(seconds):.0f} s, {len(alone)} of "
        f"them without c0 (rounds {[r['round'] for r in alone][:3]}...), in the last one "
        f"{len(records[-1]['clients'])} clients; same bits as in one process: {same}"
    )


def slow(hosts: Hosts, folder: Path) -> None:
    """Seconds to the same accuracy with one client ten times slower."""
    folder.mkdir()

    def brake(out: Path, clients: dict[str, subprocess.Popen[bytes]]) -> None:
        # `ip netns exec` becomes the client: it has the same number.
        client = clients["c2"]
        while client.poll() is None:
            client.send_signal(signal.SIGSTOP)
            time.sleep(0.09)
            client.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    found: dict[str, list[float]] = {"synchronous": [], "buffered": []}
    for seed in range(3):
        for name, reached in found.items():
            place = Place(
                folder / f"{name}-{seed}",
                seed=seed,
                examples=400,
                hidden=[512, 512],
                rounds=14 if name == "synchronous" else 45,
                more=SLOW + (BUFFERED if name == "buffered" else ""),
            )
            seconds = 0.0
            for record in place.deploy(meanwhile=brake):
                seconds += float(record["seconds"])
                if float(record["accuracy"]) >= ACCURACY:
                    reached.append(seconds)
                    break
            said = f"{seconds:.1f} s to {ACCURACY:.0%} in round {record['round']}"
            print(f"one client ten times slower, seed {seed}, {name}: {said}", flush=True)
    for name, reached in found.items():
        print(f"{name}: {statistics.median(reached):.1f} s (median of {len(reached)} seeds)")


PARTS = {"even": even, "line": line, "delay": delay, "cut": cut, "slow": slow}


def main() -> None:
    """Measures the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=[*PARTS], choices=[*PARTS])
    parser.add_argument("--relay", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.relay is not None:
        asyncio.run(relay(given.relay))
        return
    print(f"{this_processor()}, {os.cpu_count()} cores", flush=True)
    # Stopped from outside, too, nothing is left behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    hosts = Hosts()
    try:
        with tempfile.TemporaryDirectory() as name:
            for part in given.parts:
                PARTS[part](hosts, Path(name) / part)
    finally:
        hosts.close()


if __name__ == "__main__":
    main()
