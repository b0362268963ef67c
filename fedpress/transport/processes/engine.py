"""The engine of worker processes: it connects the clients of each stage with processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fedpress.core.names import ClientId
from fedpress.errors import Argument, RunError
from fedpress.transport.actor import Side
from fedpress.transport.processes.settings import ProcessSettings
from fedpress.transport.processes.transport import ProcessTransport


@dataclass(eq=False)
class ProcessEngine:
    """Runs simulated clients in worker processes; see `fedpress.workspace.state.Engine`.

    Attributes:
        workers: number of worker processes.
        patience: see `ProcessTransport`.
        latest: transport to the clients of the current stage; None before the first stage.
    """

    workers: int
    patience: float = 0.0
    latest: ProcessTransport | None = None

    def connect(
        self, clients: Mapping[ClientId, Side], build: Callable[..., Any]
    ) -> ProcessTransport:
        """Returns a transport to `clients`, and ends the workers of the stage before.

        Args:
            clients: name of each client -> the object that answers for it.
            build: not called, because workers have all that this process has.

        Raises:
            RunError: if the model is on a GPU, which forked processes cannot use.
        """
        self.end_stage()
        device = device_of(clients)
        if device.type != "cpu":
            raise RunError(
                f"worker processes compute on the CPU, and the device is {device.type}",
                place="engine",
                cure=("give ", Argument("engine", "local"), ", or ", Argument("device", "cpu")),
            )
        self.latest = ProcessTransport(clients, self.workers, patience=self.patience)
        return self.latest

    @property
    def rounding(self) -> str:
        """None of its own; see `fedpress.workspace.state.Engine`."""
        return ""

    def end_stage(self) -> None:
        """Ends the workers of the current stage."""
        if self.latest is not None:
            self.latest.close()
        self.latest = None


def why_no_fork() -> str:
    """Returns why this process cannot fork worker processes; "" if it can."""
    # macOS has forks, but some of its libraries crash after one.
    if not hasattr(os, "fork") or os.uname().sysname != "Linux":
        return "worker processes are forks, which need Linux"
    # Python lets no such process start others, because it would end without waiting for them.
    if multiprocessing.current_process().daemon:
        return (
            "this process is a worker of `multiprocessing` itself (a daemon), and Python lets it "
            "start no others"
        )
    return ""


def device_of(clients: Mapping[ClientId, Side]) -> torch.device:
    """Returns the device on which the clients train; it is the same for all."""
    common = next(iter(clients.values())).common
    return next((p.device for p in common.model.parameters()), torch.device("cpu"))


@contextmanager
def open_processes(settings: ProcessSettings) -> Iterator[ProcessEngine]:
    """Yields the engine, and ends its workers after the block.

    Raises:
        RunError: if this process cannot fork others.
    """
    if why := why_no_fork():
        raise RunError(
            why,
            place="engine",
            cure=("give ", Argument("engine", "local"), " or ", Argument("engine", "ray")),
        )
    engine = ProcessEngine(settings.number)
    try:
        yield engine
    finally:
        engine.end_stage()
