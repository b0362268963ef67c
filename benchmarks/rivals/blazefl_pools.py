"""BlazeFL: its pool of threads or its pool of processes, one for each core.

BlazeFL recommends threads on a Python without the global lock (3.14, free-threaded); with the lock
the threads wait for each other between torch's operations. Its other way is processes: a new pool
in each round, models in shared memory. Engine "threads" and engine "processes".

Its own FedAvg builds the network anew for each client and loads images one by one; here each
worker keeps a network, and batches are gathered from memory, as the other simulators do. In bf16
only the images are channels last: BlazeFL cannot make a vector of weights that are.
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from blazefl.core import (
    IPCMode,
    ProcessPoolClientTrainer,
    SHMHandle,
    ThreadPoolClientTrainer,
    deserialize_model,
    serialize_model,
)
from plain import as_dense, one_epoch
from shared import Clock, Images, Task, accuracy, cnn, load
from torch import Tensor, nn


@dataclass
class Package:
    """A model as one vector, in either direction.

    Attributes:
        parameters: the vector; SHMHandle where it lies in a buffer that both processes share.
        size: number of images that the model was trained on.
    """

    parameters: Tensor | SHMHandle
    size: int


def train(model: nn.Module, start: Tensor, cid: int, task: Task, data: Images) -> int:
    """Trains `model` from `start` on the images of a client; returns their number."""
    deserialize_model(model, start)
    rows = data.clients[cid]
    one_epoch(model, data.x, data.y, rows, task)
    return len(rows)


class Threads(ThreadPoolClientTrainer[Package, Package]):
    """Trains the clients of a round in threads."""

    def __init__(self, task: Task, data: Images) -> None:
        """Makes a network for each thread."""
        self.task = task
        self.data = data
        self.num_parallels = task.threads
        self.device = "cpu"
        self.device_count = 0
        self.cache: list[Package] = []
        self.stop_event = threading.Event()
        self.models: queue.SimpleQueue[nn.Module] = queue.SimpleQueue()
        for _ in range(task.threads):
            self.models.put(cnn())

    def worker(
        self, cid: int, device: str, payload: Package, stop_event: threading.Event
    ) -> Package:
        """Trains one client."""
        torch.set_num_threads(1)
        model = self.models.get()
        size = train(model, payload.parameters, cid, self.task, self.data)
        package = Package(serialize_model(model), size)
        self.models.put(model)
        return package


@dataclass
class Job:
    """What a process is told of a client.

    Attributes:
        cid: number of the client.
        seed: of its random numbers: forked processes would all draw the same ones.
    """

    cid: int
    seed: int


class Processes(ProcessPoolClientTrainer[Package, Package, Job]):
    """Trains the clients of a round in processes, which inherit data and network by their fork."""

    task: Task
    data: Images
    model: nn.Module

    def __init__(self, task: Task, data: Images) -> None:
        """Puts what all processes need where a fork finds it: in the class."""
        Processes.task, Processes.data, Processes.model = task, data, cnn()
        self.num_parallels = task.threads
        self.share_dir = Path()
        self.device = "cpu"
        self.device_count = 0
        self.cache: list[Package] = []
        self.ipc_mode = IPCMode.SHARED_MEMORY
        # The pool sends it to the processes with each client, which only a manager's can be.
        self.stop_event = multiprocessing.Manager().Event()

    def get_client_config(self, cid: int) -> Job:
        """Returns what a process is told of a client."""
        return Job(cid, int(torch.randint(2**31, ())))

    def prepare_uplink_package_buffer(self) -> Package:
        """Returns where a process writes its model."""
        return Package(serialize_model(self.model), 0)

    @staticmethod
    def worker(
        config: Job,
        payload: Package,
        device: str,
        stop_event: threading.Event,
        *,
        shm_buffer: Package | None = None,
    ) -> Package:
        """Trains one client, in a process of the pool."""
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        here = Processes
        size = train(here.model, payload.parameters, config.cid, here.task, here.data)
        shm_buffer.parameters.copy_(serialize_model(here.model))
        return Package(SHMHandle(), size)


TRAINERS = {"threads": Threads, "processes": Processes}
"""Engine -> its trainer."""


def main() -> None:
    """Runs the rounds."""
    task = Task.read()
    clock = Clock(task)
    raw = load(task.folder)
    data = Images(as_dense(raw.x, task), raw.y, as_dense(raw.held_x, task), raw.held_y, raw.clients)
    trainer = TRAINERS[task.engine](task, data)
    model = cnn()
    clock.lap()
    share = 0.0
    for _ in range(task.rounds):
        cohort = torch.randperm(len(data.clients))[: task.cohort].tolist()
        trainer.local_process(Package(serialize_model(model), 0), cohort)
        packages, trainer.cache = trainer.cache, []
        total = sum(package.size for package in packages)
        # BlazeFL's own way of taking the mean.
        mean = torch.zeros_like(packages[0].parameters)
        for package in packages:
            mean.add_(package.parameters, alpha=package.size / total)
        deserialize_model(model, mean)
        # The threads of the pool have set it to one.
        torch.set_num_threads(task.threads)
        share = accuracy(model, data.held_x, data.held_y, task.dtype)
        clock.lap()
    clock.write(share, ["blazefl"])


if __name__ == "__main__":
    main()
