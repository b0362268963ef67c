"""FedAvg as one would write it down: one process for each core, a loop over the clients in each.

In bf16 the steps run under autocast, with the images of a batch channels last.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from shared import Clock, Images, Task, accuracy, cnn, load, normalised
from torch import Tensor, nn


def as_dense(x: Tensor, task: Task) -> Tensor:
    """Returns normalised images in the memory format that is fast at the task's precision."""
    x = normalised(x)
    return x if task.dtype is None else x.contiguous(memory_format=torch.channels_last)


def network(task: Task) -> nn.Sequential:
    """Returns the network in the memory format of `as_dense`."""
    model = cnn()
    return model if task.dtype is None else model.to(memory_format=torch.channels_last)


def one_epoch(model: nn.Module, x: Tensor, y: Tensor, rows: Tensor, task: Task) -> None:
    """Trains `model` for one epoch of SGD on the images `rows`, in random order."""
    optimizer = torch.optim.SGD(model.parameters(), task.lr)
    for batch in rows[torch.randperm(len(rows))].split(task.batch):
        optimizer.zero_grad()
        with torch.autocast("cpu", task.dtype, enabled=task.dtype is not None):
            loss = F.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()


def work(
    task: Task, data: Images, weights: list[Tensor], total: list[Tensor], line: Connection
) -> None:
    """Runs in a process of its own: trains the clients that `line` names, until it names none.

    Args:
        task: the task.
        data: the data; its images are normalised.
        weights: the global model, in shared memory.
        total: the sum of the changes of this worker's clients is written here, in shared memory.
        line: gives numbers of clients; gets one answer for each list.
    """
    torch.set_num_threads(1)
    model = network(task)
    parameters = list(model.parameters())
    while (clients := line.recv()) is not None:
        for part in total:
            part.zero_()
        for client in clients:
            with torch.no_grad():
                for parameter, start in zip(parameters, weights, strict=True):
                    parameter.copy_(start)
            one_epoch(model, data.x, data.y, data.clients[client], task)
            with torch.no_grad():
                for part, parameter, start in zip(total, parameters, weights, strict=True):
                    part += parameter - start
        line.send(True)


def main() -> None:
    """Runs the rounds."""
    task = Task.read()
    clock = Clock(task)
    torch.set_num_threads(task.threads)
    raw = load(task.folder)
    data = Images(as_dense(raw.x, task), raw.y, as_dense(raw.held_x, task), raw.held_y, raw.clients)
    for tensor in (data.x, data.y, data.clients):
        tensor.share_memory_()
    model = network(task)
    weights = [parameter.detach().share_memory_() for parameter in model.parameters()]
    context = mp.get_context("spawn")
    workers = []
    for _ in range(task.threads):
        line, far = context.Pipe()
        total = [torch.zeros_like(start).share_memory_() for start in weights]
        process = context.Process(target=work, args=(task, data, weights, total, far), daemon=True)
        process.start()
        workers.append((process, line, total))
    # A first job without clients: the workers are ready when the first round begins.
    for _, line, _ in workers:
        line.send([])
    for _, line, _ in workers:
        line.recv()
    clock.lap()
    share = 0.0
    for _ in range(task.rounds):
        cohort = torch.randperm(len(data.clients))[: task.cohort].tolist()
        for number, (_, line, _) in enumerate(workers):
            line.send(cohort[number :: task.threads])
        for _, line, _ in workers:
            line.recv()
        for start, *parts in zip(weights, *(total for _, _, total in workers), strict=True):
            start += sum(parts) / task.cohort
        share = accuracy(model, data.held_x, data.held_y, task.dtype)
        clock.lap()
    for process, line, _ in workers:
        line.send(None)
        process.join()
    clock.write(share, [])


if __name__ == "__main__":
    main()
