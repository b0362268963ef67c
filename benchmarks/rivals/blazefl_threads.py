"""BlazeFL: its pool of threads, the mode that it recommends, one thread for each core.

Its own FedAvg builds the network anew for each client and loads images one by one; here each
thread keeps a network, and batches are gathered from memory, as the other simulators do. BlazeFL
is made for a Python without the global lock; with the lock the threads wait for each other
between torch's operations.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass

import torch
from blazefl.core import ThreadPoolClientTrainer, deserialize_model, serialize_model
from plain import as_dense, network, one_epoch
from shared import Clock, Images, Task, accuracy, load
from torch import Tensor, nn


@dataclass
class Package:
    """A model as one vector, in either direction.

    Attributes:
        parameters: the vector.
        size: number of images that the model was trained on.
    """

    parameters: Tensor
    size: int


class Trainer(ThreadPoolClientTrainer[Package, Package]):
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
            self.models.put(network(task))

    def uplink_package(self) -> list[Package]:
        """Returns the clients' models and forgets them."""
        packages, self.cache = self.cache, []
        return packages

    def worker(
        self, cid: int, device: str, payload: Package, stop_event: threading.Event
    ) -> Package:
        """Trains one client."""
        torch.set_num_threads(1)
        model = self.models.get()
        deserialize_model(model, payload.parameters)
        rows = self.data.clients[cid]
        one_epoch(model, self.data.x, self.data.y, rows, self.task)
        package = Package(serialize_model(model), len(rows))
        self.models.put(model)
        return package


def main() -> None:
    """Runs the rounds."""
    task = Task.read()
    clock = Clock(task)
    raw = load(task.folder)
    data = Images(as_dense(raw.x, task), raw.y, as_dense(raw.held_x, task), raw.held_y, raw.clients)
    trainer = Trainer(task, data)
    model = network(task)
    clock.lap()
    share = 0.0
    for _ in range(task.rounds):
        cohort = torch.randperm(len(data.clients))[: task.cohort].tolist()
        trainer.local_process(Package(serialize_model(model), 0), cohort)
        packages = trainer.uplink_package()
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
