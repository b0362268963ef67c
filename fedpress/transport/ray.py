"""Simulated clients as Ray actors, on one machine or on a cluster; no other module uses Ray.

Each actor is a process that holds some clients, and works on one request at a time. A client's part
of a stage is its *side* (`fedpress.transport.actor.Side`): it answers the server's requests. Data
and model go to an actor once, through Ray's object store; after that the same bytes travel as in
every transport. Ray is imported when the engine is opened, and sends no telemetry.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedpress.core import own_modules
from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import Argument, NetworkError, RunError, SettingError, Shell
from fedpress.federation.client_state import ClientState
from fedpress.federation.exchange import Answer, RequestId, Traffic, error, failure
from fedpress.transport.actor import Host, Reply, Side, Stored, versions
from fedpress.transport.packed import PackedMessage, PackedMessages, read_answer
from fedpress.wire.message import MAX_BYTES, Message, pack

log = logger(__name__)

WINDOW = 2
"""Most requests that an actor has at once: the one it works on, and the next one, so that it need
not wait."""
SET_UP = ("agree", "roster")
"""Kinds of messages that a client in a new process must get again, in this order."""
START_WITHIN = 300.0
"""Seconds after which an actor that has not started counts as failed."""
LOST = "the process of this client was lost; a new one takes its place"
"""Text of the answer to a request whose actor was lost."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment variables that are set before Ray is imported. The first switches off telemetry. With
the second, Ray leaves CUDA_VISIBLE_DEVICES as it is in actors without a GPU; this will become the
default of Ray, and until then Ray warns if the variable is not set."""


def check_installed() -> None:
    """Checks that Ray is installed.

    Raises:
        NetworkError: if it is not.
    """
    if find_spec("ray") is None:
        raise NetworkError(
            "Ray is not installed", place="engine", cure='pip install "fedpress[ray]"'
        )


class RaySettings(BaseModel):
    """Where the actors run, and what each of them takes.

    Attributes:
        address: address of a running cluster, of which this machine is a node: "auto" or HOST:PORT.
            None: Ray is started on this machine, and ended with the run.
        cpus_per_client: number of CPUs of an actor, which runs one client at a time. Torch uses as
            many threads, rounded down, but at least one.
        gpus_per_client: number of GPUs of an actor; 0: the clients train on the CPU.
        actors: largest number of actors; None: as many as the cluster has room for. There are never
            more actors than clients.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ray"] = "ray"
    address: str | None = None
    cpus_per_client: float = Field(default=1.0, gt=0)
    gpus_per_client: float = Field(default=0.0, ge=0)
    actors: int | None = Field(default=None, ge=1)

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdigit() or "/" in value:
            raise SettingError(
                f"got {value!r}, expected auto or HOST:PORT",
                cure="give the address that ray start --head printed, such as 10.0.0.1:6379",
            )
        return value

    def model_post_init(self, context: Any) -> None:
        """Checks that Ray is installed, so that the error comes before any work."""
        check_installed()

    @property
    def threads(self) -> int:
        """Threads of torch in each actor."""
        return max(1, int(self.cpus_per_client))

    @property
    def size(self) -> str:
        """Numbers of CPUs and GPUs of an actor, in words."""
        return f"{self.cpus_per_client:g} CPUs and {self.gpus_per_client:g} GPUs"

    @contextmanager
    def open(self) -> Iterator[RayEngine]:
        """Connects to the cluster, or starts one on this machine.

        Raises:
            NetworkError: if there is no cluster at the address, or it has no room.
        """
        os.environ.update(QUIET)
        if self.address is None and "ray" not in sys.modules:
            # Ray listens on all addresses of the machine, and whoever reaches it may run code, so a
            # token is required. Ray reads both variables when it is imported. Values that the user
            # has set are kept.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        import ray

        # A notebook may be connected to a cluster already.
        own = not ray.is_initialized()
        if own:
            _connect(ray, self.address)
        engine = RayEngine(self, ray)
        try:
            # A cluster without room fails here, and not when the first stage with clients begins.
            engine.number_of_actors(1)
            yield engine
        finally:
            engine.end_stage()
            if own:
                ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    """Connects this process to a cluster.

    Raises:
        NetworkError: if that fails.
    """
    cure = (
        "start a cluster on this machine with ray start --head, or leave out ",
        Argument("engine.address"),
    )
    if address not in (None, "auto"):
        host, _, port = str(address).rpartition(":")
        # Ray itself would try for minutes.
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as problem:
            raise NetworkError(
                f"nothing answers at {address} ({problem})", place="engine.address", cure=cure
            ) from problem
    try:
        ray.init(
            # Not None: that would join any cluster that runs on this machine.
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            **({} if address else {"include_dashboard": False}),
        )
    # Ray raises ConnectionError, RuntimeError (another version of Ray or Python), ValueError.
    except Exception as problem:
        said = " ".join(str(problem).split())[:300]
        raise NetworkError(
            f"the cluster cannot be joined ({said})", place="engine.address", cure=cure
        ) from problem


@dataclass(eq=False)
class RayEngine:
    """Runs simulated clients as actors; see `fedpress.workspace.state.Engine`.

    Attributes:
        settings: what each actor takes.
        ray: the imported library.
        latest: transport to the actors of the current stage; None if there are no actors.
    """

    settings: RaySettings
    ray: Any
    latest: RayTransport | None = None

    def connect(self, clients: Mapping[ClientId, Side], build: Callable[..., Any]) -> RayTransport:
        """Starts the actors of a stage, and ends those of the stage before.

        Raises:
            NetworkError: if the cluster has no room, or an actor cannot load its clients.
        """
        self.end_stage()
        cluster = Cluster(self.settings, self.ray, self.ray.put(_pickled(self.ray, build)))
        count = self.number_of_actors(len(clients))
        names = list(clients)
        homes = []
        for first in range(count):
            own = names[first::count]
            # What all sides share is made in the actor by `build`, and what a client has stored
            # comes with its first request. So neither is pickled here.
            bare: dict[ClientId, Any] = {}
            for name in own:
                side: Any = clients[name]
                bare[name] = replace(side, common=None, memory=None)
            homes.append(Home(tuple(own), self.ray.put(_pickled(self.ray, bare))))
        cluster.start(homes)
        log.info("%d clients on %d actors of Ray", len(names), count)
        memories = {name: side.memory for name, side in clients.items()}
        self.latest = RayTransport(cluster, homes, memories)
        return self.latest

    def number_of_actors(self, clients: int) -> int:
        """Returns how many actors to start for so many clients.

        Raises:
            NetworkError: if the cluster has less room than `settings.actors`, or no room at all.
        """
        room = self._room()
        wanted = self.settings.actors or 1
        if room < wanted:
            raise NetworkError(
                f"the cluster has room for {room} actors of {self.settings.size}, expected {wanted}",
                place="engine.actors" if self.settings.actors else "engine",
                cure=(
                    "add nodes, or lower ",
                    Argument("engine.actors"),
                    ", ",
                    Argument("engine.cpus_per_client"),
                    " or ",
                    Argument("engine.gpus_per_client"),
                ),
            )
        return min(clients, self.settings.actors or room)

    def _room(self) -> int:
        """Returns how many actors fit on the nodes. An actor cannot use CPUs of two nodes."""
        settings = self.settings
        room = 0
        for node in self.ray.nodes():
            if not node["Alive"]:
                continue
            has = node["Resources"]
            fits = int(has.get("CPU", 0) / settings.cpus_per_client)
            if settings.gpus_per_client:
                fits = min(fits, int(has.get("GPU", 0) / settings.gpus_per_client))
            room += fits
        return room

    def end_stage(self) -> None:
        """Ends the actors of the current stage."""
        if self.latest is not None:
            self.latest.close()
        self.latest = None


def _pickled(ray: Any, what: Any) -> bytes:
    """Pickles `what` for another machine, which need not have the user's own modules.

    Raises:
        NetworkError: if `what` cannot be pickled.
    """
    for name in own_modules.found():
        if name in sys.modules:
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])
    # Any exception, because the class of a user's model may define its own pickling.
    try:
        data: bytes = ray.cloudpickle.dumps(what)
    except Exception as problem:
        raise NetworkError(
            f"model or data cannot be sent to other processes ({problem})",
            place="engine",
            cure=("leave out ", Argument("engine")),
        ) from problem
    return data


@dataclass(eq=False)
class Home:
    """An actor and its clients.

    Attributes:
        clients: names of its clients.
        sides: reference, in Ray's object store, to the pickled sides of these clients, without
            what all sides share and without what a client has stored.
        actor: handle of the actor; None: not started, or lost.
        waiting: requests that were not sent to the actor yet.
        working: request -> reference to its reply, in the order in which the actor works.
    """

    clients: tuple[ClientId, ...]
    sides: Any
    actor: Any = None
    waiting: deque[RequestId] = field(default_factory=deque)
    working: dict[RequestId, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Cluster:
    """Starts and ends actors.

    Attributes:
        settings: what each actor takes.
        ray: the imported library.
        build: reference to the pickled function that makes what all sides share.
    """

    settings: RaySettings
    ray: Any
    build: Any

    def start(self, homes: Sequence[Home]) -> None:
        """Starts the actors of `homes` at the same time, and waits until all have their clients.

        Raises:
            NetworkError: if an actor does not start, has other versions than this process, or
                cannot load its clients.
        """
        settings = self.settings
        remote = self.ray.remote(Host).options(
            num_cpus=settings.cpus_per_client,
            num_gpus=settings.gpus_per_client,
            # Ray must not start a lost actor again: a new actor also needs what its clients have
            # stored, which only this process has.
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        device = "cuda" if settings.gpus_per_client else "cpu"
        for home in homes:
            home.actor = remote.remote()
        # Compared before the pickles are loaded, since another version may be unable to load them.
        for found in self._all([home.actor.versions.remote() for home in homes]):
            for name, own in versions().items():
                if found[name] != own:
                    raise NetworkError(
                        f"an actor has {name} {found[name]}, this process {own}",
                        place="engine",
                        cure="install the same versions on all nodes",
                    )
        loads = []
        for home in homes:
            load = home.actor.load
            loads.append(
                load.remote(self.build, home.sides, device=device, threads=settings.threads)
            )
        for why in self._all(loads):
            if why:
                raise NetworkError(
                    f"an actor cannot load its clients ({why})",
                    place="engine",
                    cure="install what the model imports on all nodes",
                )

    def _all(self, references: list[Any]) -> list[Any]:
        """Waits for the results of calls to actors.

        Raises:
            NetworkError: if an actor fails, or a result is missing after `START_WITHIN` seconds.
        """
        try:
            found: list[Any] = self.ray.get(references, timeout=START_WITHIN)
        except self.ray.exceptions.RayError as problem:
            said = " ".join(str(problem).split())[:300]
            raise NetworkError(
                f"an actor of {self.settings.size} did not start ({said})",
                place="engine",
                cure=(
                    "add a node or end other work on the cluster",
                    Shell(", then go on with --resume"),
                ),
            ) from problem
        return found

    def end(self, homes: Sequence[Home]) -> None:
        """Ends the actors of `homes`."""
        for home in homes:
            if home.actor is not None:
                self.ray.kill(home.actor)
            home.actor = None


class RayTransport:
    """Carries messages to clients in actors, which work at the same time.

    If an actor is lost, the request that it worked on gets an answer of kind "error". A new actor
    is started, and answers the requests that the lost one had not begun.

    What a client stores comes back with its answer, and `receive` writes it to the server's storage
    (`memories`) when it returns the answer. A request that is cancelled while a client works on it
    leaves no trace, as with the local transport: before its next request the client is set back to
    what is stored in `memories`. This is enough, because a schedule never sends a client two
    requests at a time.
    """

    def __init__(
        self,
        cluster: Cluster,
        homes: Sequence[Home],
        memories: Mapping[ClientId, ClientState],
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Makes a transport.

        Args:
            cluster: starts a lost actor again.
            homes: the started actors.
            memories: name of each client -> where its state is stored between rounds.
            max_bytes: largest accepted answer, in bytes.
        """
        self._cluster = cluster
        self._ray = cluster.ray
        self.homes = list(homes)
        self._home = {name: home for home in homes for name in home.clients}
        self._memories = dict(memories)
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._sent = 0
        self._open: dict[RequestId, tuple[ClientId, PackedMessage]] = {}
        self._replies: dict[RequestId, Reply] = {}
        # Clients whose stored state must be sent to their actor with their next request.
        self._away = set(self._memories)
        self._set_up: dict[ClientId, dict[str, bytes]] = {name: {} for name in self._memories}
        # The bytes of a message to many clients are put into Ray's object store only once.
        self._packed = PackedMessages(self._ray.put)

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._memories)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Gives `message` to the actor of `client`, or lets it wait for its turn."""
        packed = self._packed.of(message)
        self._traffic += Traffic(down=len(packed.data))
        self._sent += 1
        self._open[self._sent] = client, packed
        home = self._home[client]
        home.waiting.append(self._sent)
        self._feed(home)
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the answer to the first of `requests`, in the order in which they were sent.

        The answer to a later request may be ready sooner, but it waits: a schedule that takes the
        first answers must choose the same clients as with the local transport.

        Args:
            requests: the requests to wait for.
            timeout: seconds after which None is returned; None: no limit.

        Returns:
            The answer; None after `timeout` seconds, or if none of `requests` is open.

        Raises:
            NetworkError: if a lost actor cannot be started again.
        """
        end = None if timeout is None else time.monotonic() + timeout
        first = next((request for request in self._open if request in requests), None)
        if first is None:
            return None
        while first not in self._replies:
            working: dict[Any, Home] = {}
            for home in self.homes:
                working |= dict.fromkeys(home.working.values(), home)
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, _ = self._ray.wait(list(working), num_returns=1, timeout=left)
            if not ready:
                return None
            self._collect(working[ready[0]])
        return self._deliver(first)

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`. A request that was not sent to an actor yet costs no work."""
        for request in requests:
            if request not in self._open:
                continue
            client, _ = self._open.pop(request)
            waiting = self._home[client].waiting
            if request in waiting:
                waiting.remove(request)
            else:
                self._replies.pop(request, None)
                self._away.add(client)

    def close(self) -> None:
        """Ends the actors."""
        self._cluster.end(self.homes)

    def _feed(self, home: Home) -> None:
        """Sends waiting requests to an actor; if it was lost, a new actor is started first."""
        while home.waiting and len(home.working) < WINDOW:
            if home.actor is None:
                log.warning("the actor of %s is started again", ", ".join(home.clients[:3]))
                self._cluster.start([home])
            request = home.waiting.popleft()
            client, packed = self._open[request]
            try:
                stored = self._stored(client)
            # A damaged file: the client fails, as it does in the local transport.
            except RunError as problem:
                self._replies[request] = Reply(pack(failure(problem)))
                continue
            self._away.discard(client)
            kind = packed.message.kind
            if kind in SET_UP:
                self._set_up[client][kind] = packed.data
            home.working[request] = home.actor.answer.remote(client, packed.shared, stored)

    def _stored(self, client: ClientId) -> Stored | None:
        """Returns the state to send with a client's next request; None if its actor has it."""
        if client not in self._away:
            return None
        known = self._set_up[client]
        set_up = tuple(known[kind] for kind in SET_UP if kind in known)
        return Stored(self._memories[client].copied(), set_up)

    def _collect(self, home: Home) -> None:
        """Takes the replies that an actor has ready, and gives it more work."""
        while home.working:
            request, reference = next(iter(home.working.items()))
            # The actor works in order, so no later reply is ready if this one is not.
            if not self._ray.wait([reference], timeout=0)[0]:
                break
            del home.working[request]
            try:
                reply: Reply = self._ray.get(reference)
            except self._ray.exceptions.RayError as problem:
                log.warning("an actor was lost: %s", problem)
                reply = Reply(pack(error(LOST)))
                self._leave(home)
            # The request may have been cancelled meanwhile.
            if request in self._open:
                self._replies[request] = reply
        self._feed(home)

    def _leave(self, home: Home) -> None:
        """Ends a lost actor. Requests that it had not begun wait for the next actor."""
        self._cluster.end([home])
        for request in reversed(home.working):
            if request in self._open:
                home.waiting.appendleft(request)
        home.working.clear()
        self._away.update(home.clients)

    def _deliver(self, request: RequestId) -> Answer:
        """Writes what the client has stored to the server's storage, and returns the answer."""
        client, _ = self._open.pop(request)
        reply = self._replies.pop(request)
        data = reply.data
        # Before the answer is used: after a crash a client must still know what it has answered.
        try:
            for write in reply.writes:
                write.store(self._memories[client])
        # A full disk: the client fails, as it does in the local transport.
        except Exception as problem:
            data = pack(failure(problem))
            self._away.add(client)
        self._traffic += Traffic(up=len(data))
        return client, request, read_answer(data, self._max_bytes)
