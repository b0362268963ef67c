"""A small federation for the tests: an MLP, clients with random examples, and everything that binds them."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import islice

import torch
from torch import nn

from fedpress.codecs import Key
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
    rounds,
)
from fedpress.federation.private import joint_steps, private_steps
from fedpress.privacy.plan import PrivacyPlan
from fedpress.tasks import Classification
from fedpress.transport import LocalTransport
from fedpress.wire import Message


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def examples(n: int, seed: int = 0) -> Arrays:
    gen = torch.Generator().manual_seed(seed)
    return Arrays(torch.randn(n, 6, generator=gen), torch.randint(0, 3, (n,), generator=gen))


GOAL = Classification(("a", "b", "c"))


def untouched(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return x


def client_plan(cohort: Cohort, noise: float = 1.0, clip_norm: float = 0.5) -> PrivacyPlan:
    return PrivacyPlan("client", clip_norm, cohort.sampling_prob, noise)


SAMPLE_PLAN = PrivacyPlan("sample", 1.0, 0.2, 1.0, steps_per_round=4)


class Federation:
    """Clients c0, c1, ... with 10, 14, 18, ... examples; change what a test is about through keywords."""

    def __init__(
        self,
        clients=4,
        *,
        cohort=None,
        privacy=None,
        weights="examples",
        settings=None,
        model=None,
        chain=(),
        **more,
    ):
        self.model = model or mlp()
        self.settings = settings or LocalSettings(batch_size=4, momentum=0.5)
        self.params, self.layout = parameters.flatten(self.model), parameters.Layout.of(self.model)
        cohort = cohort or Cohort(clients, clients)
        extras = more["algorithm"].extras_up if "algorithm" in more else {}
        self.uplink = Uplink.bind(
            Payload(len(self.params), chain=chain, extras=extras),
            cohort,
            weights=weights,
            guarantee=Guarantee(privacy),
        )
        self.data = [examples(10 + 4 * i, seed=i) for i in range(clients)]
        sample = privacy is not None and privacy.unit == "sample"
        private = {"privacy": privacy} if sample else {}
        mine = {one.name: more.pop(one.name) for one in fields(Terms) if one.name in more}
        mine = {"seed": 7, "prepare": untouched, "task": GOAL} | mine
        self.terms = Terms(self.layout, self.settings, **({"uplink": self.uplink} | mine))
        if "plan" in more:  # of the client alone, whatever the uplink says
            private["privacy"] = more.pop("plan")
        own = {"source": more.pop("source")} if "source" in more else {}
        plan = ClientPlan.bind(self.terms, self.model, **(private | own))
        self.clients = {
            f"c{i}": Client(f"c{i}", arrays, self.model, plan, **more)
            for i, arrays in enumerate(self.data)
        }

    @property
    def transport(self) -> LocalTransport:
        return LocalTransport({name: client.handle for name, client in self.clients.items()})

    @property
    def agreement(self) -> str:
        return self.terms.agreement.fingerprint

    def fit(self, round: int = 1) -> Message:
        return Message(
            "fit", {"round": round, "agreement": self.agreement}, {"params": self.params}
        )


def under(federation, **changes):
    """Lets the server and all clients of `federation` work under terms with `changes`, and returns them.

    Transports that were made before still reach the clients.
    """
    federation.terms = terms = replace(federation.terms, **changes)
    for client in federation.clients.values():
        plan = ClientPlan.bind(terms, client.model, privacy=client.plan.local.privacy)
        object.__setattr__(client, "plan", plan)
    return terms


def run_rounds(federation, num_rounds, *, transport=None, start=None, delays=None, **changes):
    """Runs rounds up to `num_rounds` under the federation's terms with `changes`; see `under`."""
    terms = under(federation, **changes)
    start = start or Start(federation.params)
    running = rounds(terms, transport or federation.transport, start, delays=delays)
    return islice(running, num_rounds - start.round)


def after(record) -> Start:
    """Where the next round goes on from."""
    return Start(record.params, record.round, record.server_state)


def rebound(client, model=None, **changes) -> Client:
    """Returns `client` under other terms (fields of `Terms`), or with another plan or memory of its own."""
    names = {one.name for one in fields(Terms)}
    terms = replace(client.terms, **{n: changes.pop(n) for n in names & changes.keys()})
    own = {"source": None, "privacy": client.plan.local.privacy}
    own |= {n: changes.pop(n) for n in own.keys() & changes.keys()}
    model = client.model if model is None else model
    return replace(client, model=model, plan=ClientPlan.bind(terms, model, **own), **changes)


def train(model, work) -> dict:
    """Takes all local steps of `work`, whatever its source; returns what was measured."""
    return work.begin(model).finish().measures


def with_source(work, source):
    """Returns the same work with other gradients."""
    return replace(work, plan=replace(work.plan, source=source))


def train_privately(model, work) -> dict:
    """Takes the noised steps of the plan of `work`."""
    return train(model, with_source(work, private_steps))


def joint_gradient(model, work) -> tuple[torch.Tensor, dict]:
    """Returns a client's part of a joint step, and what was measured."""
    run = with_source(work, joint_steps).begin(model).finish()
    return run.update(), run.measures


def key(client: str = "c0", round: int = 1) -> Key:
    return Key(7, round, client)


def update(values: torch.Tensor, round: int = 1, **header) -> Message:
    return Message("update", {"round": round, "examples": 10} | header, {"values": values})
