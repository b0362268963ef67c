"""Central training with the same network, batch and optimizer: what federated learning adds to.

A "round" is as many steps as the clients of a round take together, and the same evaluation.
"""

from __future__ import annotations

import torch
from plain import as_dense, network, one_epoch
from shared import Clock, Task, accuracy, load


def main() -> None:
    """Runs the rounds."""
    task = Task.read()
    clock = Clock(task)
    torch.set_num_threads(task.threads)
    data = load(task.folder)
    x, held = as_dense(data.x, task), as_dense(data.held_x, task)
    model = network(task)
    clock.lap()
    share = 0.0
    for _ in range(task.rounds):
        cohort = torch.randperm(len(data.clients))[: task.cohort]
        one_epoch(model, x, data.y, data.clients[cohort].flatten(), task)
        share = accuracy(model, held, data.held_y, task.dtype)
        clock.lap()
    clock.write(share, [])


if __name__ == "__main__":
    main()
