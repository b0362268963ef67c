"""Actors: processes that hold some clients each, and their start and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedpress.core.names import ClientId
from fedpress.errors import NetworkError, Shell
from fedpress.federation.exchange import RequestId
from fedpress.transport.actor import Host, versions
from fedpress.transport.ray.settings import RaySettings

START_WITHIN = 300.0
"""Seconds after which an actor that has not started counts as failed."""


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
