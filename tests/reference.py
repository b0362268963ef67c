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
