"""A real network on this machine for tests: keys, data, client processes, and both kinds of server."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedpress.core import parameters
from fedpress.core.examples import Arrays
from fedpress.federation import DiskState, RoundRecord, Start
from fedpress.network import folders, keys
from fedpress.network.data import write_arrays
from fedpress.network.gate import Gate, NoPolicy
from fedpress.network.server import ServerNetwork
from fedpress.network.sessions import Sessions
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.offer import Offer
from fedpress.stages.federate.server import ServerSide
from fedpress.transport.flower import Address, Incoming, NodeLink, ServerLink, SuperLink
from fedpress.transport.link import Parcel
from fedpress.transport.remote import Presence
from fedpress.wire.message import unpack

RECIPE = """
name = "fleet"
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
num_rounds = 4
batch_size = 10
"""
CODED = """
uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]
error_feedback = true
downlink = [{ kind = "quantize", bits = 8 }]
"""
SECURE = """
secure_keys = true
privacy = { unit = "client", trust = "distributed", noise_multiplier = 2.0, delta = 1e-3, secure_noise = true }
"""
NAMES = ("c0", "c1", "c2")
OTHERS = ("fake", "full")
"""Clients that the server lists as well: one that misbehaves, and one whose disk is full."""
PATIENCE = 240.0
"""Seconds after which a test gives up waiting: a busy machine is no fault of the code."""
# Each process with one thread: other numbers of threads add floats in another order.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def port(offset: int = 0) -> int:
    """Returns a port of this test process: several run side by side."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return int(os.environ.get("FEDPRESS_TEST_PORT", "24000")) + 50 * int(worker) + offset


def until(true: Callable[[], object], what: str, *, timeout: float = PATIENCE) -> None:
    """Waits until `true()`.

    Raises:
        AssertionError: with `what`, if that takes longer than `timeout` seconds.
    """
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@dataclass(eq=False)
class Command:
    """A command of fedpress as a process in a group of its own, and what it says."""

    words: Sequence[str]
    log: Path
    folder: Path
    limits: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.start()

    def _begin(self) -> None:
        # A shell that starts the tests in the background makes its children deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.limits is not None:
            self.limits()

    def start(self) -> None:
        """Starts it, also again after it was killed; what it says is added to the log."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "from fedpress.cli import main; main()", *self.words],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=ENVIRONMENT,
                process_group=0,
                preexec_fn=self._begin,
            )

    @property
    def said(self) -> str:
        """Everything that it has said so far, in one line."""
        return " ".join(self.log.read_text("utf-8", "replace").split())

    def wait_for(self, words: str, times: int = 1) -> None:
        """Waits until it has said `words`, a regular expression, so many times."""
        until(lambda: len(re.findall(words, self.said)) >= times, f"{words!r} in {self.log}")

    def ended(self) -> int:
        """Waits for its end and returns its exit status."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"still running: {self.said[-2000:]}") from error

    def kill(self) -> None:
        """Kills the process alone, as a crash would, with no time for anything."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it as a user would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


def processes(mark: str) -> dict[int, str]:
    """Returns the command lines with `mark` in them, by process."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            try:
                line = (
                    (place / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                )
            except OSError:
                continue
            if mark in line:
                found[int(place.name)] = line
    return found


@dataclass(eq=False)
class Fleet:
    """The folders of a network, the clients' data, and the processes that were started with them.

    Attributes:
        folder: for everything; it is in the command line of each process.
        port: of the server.
        names: of the clients that behave.
        recipe: whose data the clients have.
        commands: that were started.
    """

    folder: Path
    port: int
    names: Sequence[str] = NAMES
    recipe: str = RECIPE
    commands: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        folders.init(self.network, [*self.names, *OTHERS], "localhost", self.port)
        for name, arrays in load_data(recipes.load(self.recipe)).clients.items():
            write_arrays(self.data(name), arrays)
        for name in (*self.names, *OTHERS):
            # Most runs here are without privacy, which owners refuse by default.
            (self.home(name) / "policy.toml").write_text('privacy = "none"\n')

    @property
    def network(self) -> Path:
        """What `fedpress network init` made."""
        return self.folder / "network"

    def home(self, name: str) -> Path:
        """Returns the folder of a client."""
        return self.network / "clients" / name

    def data(self, name: str) -> Path:
        """Returns the file with a client's examples."""
        return self.folder / f"{name}.safetensors"

    def command(self, *words: str, log: str, limits: Callable[[], None] | None = None) -> Command:
        """Starts a command."""
        made = Command(words, self.folder / log, self.folder, limits)
        self.commands.append(made)
        return made

    def client(
        self,
        name: str,
        *,
        home: Path | None = None,
        data: Path | None = None,
        program: Path | None = None,
        limits: Callable[[], None] | None = None,
        log: str | None = None,
    ) -> Command:
        """Starts a client, by default with its own folder and data, and with torch."""
        home = home or self.home(name)
        words = ["client", "--network", str(home), "--ledger", str(home / "ledger.sqlite")]
        words += ["--data", str(data or self.data(name))]
        if program is not None:
            words += ["--program", str(program)]
        return self.command(*words, log=log or f"{name}.log", limits=limits)

    def copied(self, name: str, to: str) -> Path:
        """Returns a copy of a client's folder, without its sessions."""
        home = self.folder / to
        shutil.copytree(self.home(name), home, ignore=shutil.ignore_patterns("sessions", "*.lock"))
        return home

    def server(self, text: str, out: str, *words: str) -> Command:
        """Starts a server with the recipe `text`."""
        recipe = self.folder / f"{out}.toml"
        recipe.write_text(text)
        fixed = ["--network", str(self.network / "server"), "--out", str(self.folder / out)]
        fixed += ["--min-clients", str(len(self.names))]
        return self.command("server", str(recipe), *fixed, *words, log=f"{out}.log")

    @property
    def address(self) -> Address:
        """Where the server is."""
        return Address("localhost", self.port, self.network / "server" / "ca.crt")

    @contextmanager
    def link(self) -> Iterator[ServerLink]:
        """Connects this process, as `fedpress server` does."""
        config = folders.ServerFolder.read(self.network / "server").config
        own = self.network / "server"
        superlink = SuperLink(
            self.address,
            self.folder / "superlink",
            bind="127.0.0.1",
            certificate=own / "server.crt",
            key=own / "server.key",
        )
        made = ServerLink(self.address, superlink.secret, keys=config.clients, superlink=superlink)
        try:
            yield made.open()
        finally:
            made.close()

    def close(self) -> None:
        """Ends all processes, and checks that none is left."""
        for one in self.commands:
            one.close()
        left = processes(str(self.folder))
        for number in left:
            os.kill(number, signal.SIGKILL)
        assert not left


@dataclass(eq=False)
class Deployed:
    """A stage that is run from this process over the network.

    Attributes:
        side: the server's side of it.
        memory: where it is kept.
        said: sentences about clients that went and came.
        records: of the rounds so far.
    """

    side: ServerSide
    memory: Path
    said: list[str]
    records: list[RoundRecord] = field(default_factory=list)

    def rounds(self) -> Iterator[RoundRecord]:
        """Runs the rounds."""
        for record in self.side.rounds(Start(parameters.flatten(self.side.model))):
            self.records.append(record)
            yield record

    @property
    def session(self) -> str:
        """Name of the stage at the clients."""
        return self.side.transport.transport.session  # type: ignore[attr-defined]


def deployed(
    text: str, link: ServerLink, memory: Path, *, clients: Sequence[str] = NAMES
) -> Deployed:
    """Offers the first stage of the recipe `text` to `clients`, and returns it ready to run."""
    loaded = recipes.load(text)
    said: list[str] = []
    network = ServerNetwork(link, told=said.append, min_clients=len(clients))
    until(lambda: all(link.online().get(name) for name in clients), f"{clients} are not there")
    state = first_state(loaded, load_data(loaded).without_clients())
    side = bind(loaded.stage[0], dataclasses.replace(state, network=network), memory).server
    return Deployed(side, memory, said)


def simulated(text: str, memory: Path | None = None) -> list[RoundRecord]:
    """Runs the first stage of the recipe `text` in this process."""
    loaded = recipes.load(text)
    side = bind(loaded.stage[0], first_state(loaded, load_data(loaded)), memory).server
    return list(side.rounds(Start(parameters.flatten(side.model))))


def secrets_of(fleet: Fleet, run: Deployed, to: Path) -> Path:
    """Copies the secrets of server and clients to where a simulation keeps its own."""
    place = to / "stage"
    (own,) = run.memory.glob("*/server")
    copies: dict[str, Path] = {"server": own}
    for at, name in enumerate(fleet.names):
        copies[f"{at:05d}"] = fleet.home(name) / "sessions" / run.session / "memory"
    for name, folder in copies.items():
        for entry in ("secret", "identity"):
            if found := DiskState(folder).entry(entry):
                DiskState(place / name).save_entry(entry, found)
    return to


@dataclass(eq=False)
class Fake:
    """A listed client in a thread of the test, which does not answer rounds as it should.

    Attributes:
        fleet: the network.
        examples: its data.
        spoil: is called in place of an answer to a round.
        gate: policy of its owner.
    """

    fleet: Fleet
    examples: Callable[[Offer], Arrays]
    spoil: Callable[[NodeLink, Incoming], None] = lambda wire, incoming: None
    gate: Gate = field(default_factory=NoPolicy)

    def __post_init__(self) -> None:
        home = self.fleet.home("fake")
        self._sessions = Sessions("fake", home / "sessions", self.examples, self.gate)
        self._wire = NodeLink(self.fleet.address, keys.read_node_key(home / "node.key"))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._wire.connect()
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            incoming = self._wire.receive()
            if incoming is None:
                self._stopped.wait(0.02)
                continue
            parcel = incoming.parcel
            if parcel.what == "ping":
                presence = Presence("fake", "boot", (), "")
                self._wire.reply(incoming, Parcel("pong", parcel.request, "", presence.to_bytes()))
            elif unpack(parcel.body).kind in ("offer", "register", "agree"):
                body = self._sessions.answer(parcel.session, parcel.body)
                self._wire.reply(incoming, Parcel("answer", parcel.request, parcel.session, body))
            else:
                self.spoil(self._wire, incoming)

    def close(self) -> None:
        """Says goodbye."""
        self._stopped.set()
        self._thread.join(20)
        self._wire.close()
