"""FedAvg as slowly and plainly as it can be written: the oracle of `fedpress.federation.server`."""

import copy

import torch
import torch.nn.functional as F


def fedavg(model, clients, *, rounds, lr, batches, weights):
    """Trains in place; `clients` = [(x, y)], `batches(client, round)` -> index lists, `weights` = one number each."""
    for round in range(1, rounds + 1):
        mean = {
            name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()
        }
        for at, (x, y) in enumerate(clients):
            local = copy.deepcopy(model)
            for index in batches(at, round):
                grads = torch.autograd.grad(
                    F.cross_entropy(local(x[index]), y[index]), list(local.parameters())
                )
                with torch.no_grad():
                    for p, g in zip(local.parameters(), grads, strict=True):
                        p -= lr * g
            for name, p in local.named_parameters():
                mean[name] += p.detach().double() * weights[at] / sum(weights)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(mean[name])


def fedbuff(params, local_update, *, steps, buffer, concurrency, choose, delay, weight):
    """Returns the parameters after each server step; `local_update(client, version, params)` -> float64 update.

    `choose(busy)` -> the next client, `delay(client, version)` -> seconds, `weight(staleness)` -> a factor.
    """
    now, versions, out = 0.0, [params.double()], []
    working = []  # (when the answer comes, order of sending, client, version)
    arrived = []  # in the buffer: (client, update)
    sent = 0
    while len(out) < steps:
        while len(working) < concurrency:
            busy = {client for _, _, client, _ in working} | {client for client, _ in arrived}
            client = choose(busy)
            if client is None:
                break
            version = len(versions) - 1
            working.append((now + delay(client, version), sent, client, version))
            sent += 1
        working.sort()
        now, _, client, version = working.pop(0)
        update = local_update(client, version, versions[version])
        arrived.append((client, weight(len(versions) - 1 - version) * update))
        if len(arrived) == buffer:
            versions.append(versions[-1] + sum(update for _, update in arrived) / buffer)
            out.append(versions[-1])
            arrived = []
    return out
