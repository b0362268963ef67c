"""A deployment in one process for tests: a server's network over the sessions of some clients."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedpress.core import parameters
from fedpress.data.reading import Reading
from fedpress.federation import Start
from fedpress.network.gate import Gate
from fedpress.network.sessions import Sessions
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.server import ServerSide
from fedpress.transport import LocalTransport
from fedpress.wire.message import kind_of

RECIPE = """
[data]
source = "digits"
num_clients = 3
examples_per_client = 20
validation = 20
[model]
architecture = "mlp"
arguments = { in_features = 64, hidden = [8] }
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 10
"""
PRIVATE = """
[stage.privacy]
unit = "sample"
noise_multiplier = 4.0
delta = 1e-3
secure_noise = true
"""


class Marked(LocalTransport):
    """Also tells whether something has changed at a client."""

    def __init__(self, handlers: Any, machines: Machines) -> None:
        super().__init__(handlers)
        self.machines = machines

    def mark(self, client: str) -> str:
        return f"{self.machines.boots} {self.machines.gates[client].consent()}"


@dataclass(eq=False)
class Machines:
    """The clients' machines; `network` is the server's way to them."""

    folder: Path
    gates: dict[str, Gate]
    text: str = RECIPE + PRIVATE
    labels: tuple[str, ...] = ("label",)
    reading: Reading = field(default_factory=Reading)
    opened: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.recipe = recipes.load(self.text)
        self.data = load_data(self.recipe)
        self.start()

    def start(self) -> None:
        """Starts the clients' processes, or starts them again."""
        self.sessions = {}
        self.boots = getattr(self, "boots", 0) + 1
        for name, gate in self.gates.items():
            examples = partial(lambda offer, name: self.data.clients[name], name=name)
            self.sessions[name] = Sessions(name, self.folder / name, examples, gate)

    def open(self, session: str, clients: Any) -> LocalTransport:
        """See `fedpress.workspace.state.Network`."""
        self.opened.append(session)
        names = self.sessions if clients is None else clients

        def answer(name: str, request: bytes) -> bytes:
            self.asked.append((name, kind_of(request)))
            return self.sessions[name].answer(session, request)

        return Marked({name: partial(answer, name) for name in names}, self)

    def told(self, sentence: str) -> None:
        """See `fedpress.workspace.state.Network`."""
        self.sentences.append(sentence)

    def bind(self, memory: Path | None) -> ServerSide:
        """Offers the recipe's stage to the clients."""
        state = replace(first_state(self.recipe, self.data), network=self)
        return bind(self.recipe.stage[0], state, memory).server


def run(server: ServerSide, rounds: int | None = None) -> list[Any]:
    """Runs all rounds, or the first ones, and returns their records."""
    found = []
    for record in server.rounds(Start(parameters.flatten(server.model))):
        found.append(record)
        if rounds is not None and len(found) == rounds:
            break
    return found
