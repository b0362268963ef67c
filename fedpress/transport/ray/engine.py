"""The Ray engine: it connects to a cluster, and starts the actors of each stage."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fedpress.core import own_modules
from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import Argument, NetworkError
from fedpress.transport.actor import Side
from fedpress.transport.ray.actors import Cluster, Home
from fedpress.transport.ray.settings import RaySettings
from fedpress.transport.ray.transport import RayTransport

log = logger(__name__)

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment variables that are set before Ray is imported. The first switches off telemetry. With
the second, Ray leaves CUDA_VISIBLE_DEVICES as it is in actors without a GPU; this will become the
default of Ray, and until then Ray warns if the variable is not set."""


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
                (
                    f"the cluster has room for {room} actors of {self.settings.size}, "
                    f"expected {wanted}"
                ),
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

    @property
    def rounding(self) -> str:
        """None of its own; see `fedpress.workspace.state.Engine`."""
        return ""

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


@contextmanager
def open_ray(settings: RaySettings) -> Iterator[RayEngine]:
    """Connects to the cluster, or starts one on this machine.

    Raises:
        NetworkError: if there is no cluster at the address, or it has no room.
    """
    os.environ.update(QUIET)
    if settings.address is None and "ray" not in sys.modules:
        # Ray listens on all addresses of the machine, and whoever reaches it may run code, so a
        # token is required. Ray reads both variables when it is imported. Values that the user
        # has set are kept.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    # A notebook may be connected to a cluster already.
    own = not ray.is_initialized()
    if own:
        _connect(ray, settings.address)
    engine = RayEngine(settings, ray)
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
