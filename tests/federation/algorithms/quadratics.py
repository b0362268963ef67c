"""Clients whose loss is a quadratic of their own: optimum and every local step are known in closed form."""

from __future__ import annotations

from itertools import islice

import torch
from torch import nn

from fedpress.core import parameters
from fedpress.core.examples import Arrays
from fedpress.federation import (
    Client,
    ClientPlan,
    Cohort,
    Guarantee,
    LocalSettings,
    Payload,
    Start,
    Terms,
    Uplink,
)
from fedpress.federation.client_state import InMemoryState
from fedpress.federation.local import Outcome, Step
from fedpress.federation.server import rounds
from fedpress.tasks import Classification
from fedpress.transport import LocalTransport

SIZE = 5


class Quadratic(Classification):
    """The loss that `quadratic_steps` lowers, for an algorithm that asks for it: outputs are w [SIZE, 1]."""

    def loss(self, outputs, targets, *, reduction="mean"):
        a, b = targets[0].split(SIZE)
        return (a * (outputs[:, 0] - b).square()).sum() / 2


def unit_vectors(x, generator):
    """Returns inputs whose outputs are the weights themselves."""
    return torch.eye(SIZE)


def quadratic_steps(model, work):
    """Gradients of 1/2 sum a (w - b)^2, where a client's one example holds a and b."""
    (w,) = model.parameters()
    a, b = work.arrays.x[0].split(SIZE)
    for _ in range(work.plan.settings.epochs):
        gradient = (a * (w.detach()[0] - b))[None].clone()
        yield Step([w.detach()], [gradient])
        with torch.no_grad():
            w.sub_(work.lr * gradient)
    return Outcome({"loss": 0.0, "steps": work.plan.settings.epochs})


class Quadratics:
    """Clients c0, c1, ... with uneven curvatures and optima; the server begins at zero."""

    def __init__(self, algorithm, *, clients=4, cohort=None, settings=None, memories=None, **more):
        gen = torch.Generator().manual_seed(3)
        self.a = 0.2 + 2 * torch.rand(clients, SIZE, generator=gen)
        self.b = 3 * torch.randn(clients, SIZE, generator=gen)
        model = nn.Linear(SIZE, 1, bias=False)
        nn.init.zeros_(model.weight)
        self.params = parameters.flatten(model)
        self.algorithm = algorithm
        self.settings = settings or LocalSettings(epochs=10, lr=0.1)
        self.cohort = cohort or Cohort(clients, clients)
        guarantee = Guarantee(more.pop("privacy", None), more.pop("trust", None))
        aggregator = more.pop("aggregator", None)
        self.uplink = Uplink.bind(
            Payload(SIZE, extras=algorithm.extras_up),
            self.cohort,
            weights="equal",
            guarantee=guarantee,
            aggregator=aggregator,
        )
        self.terms = Terms(
            parameters.Layout.of(model),
            self.settings,
            self.uplink,
            7,
            unit_vectors,
            Quadratic(("a", "b")),
            algorithm=algorithm,
            **more,
        )
        plan = ClientPlan.bind(self.terms, model, source=quadratic_steps)
        self.names = [f"c{i}" for i in range(clients)]
        self.memories = memories or {name: InMemoryState() for name in self.names}
        self.clients = {
            name: Client(
                name,
                Arrays(torch.cat([a, b])[None], torch.cat([a, b])[None]),
                model,
                plan,
                memory=self.memories[name],
            )
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }

    @property
    def optimum(self) -> torch.Tensor:
        """Where the mean of all losses is least."""
        return (self.a * self.b).sum(0) / self.a.sum(0)

    def run(self, num_rounds, change=lambda name, handle: handle, start=None):
        handlers = {name: change(name, client.handle) for name, client in self.clients.items()}
        start = start or Start(self.params)
        running = rounds(self.terms, LocalTransport(handlers), start)
        return list(islice(running, num_rounds - start.round))
