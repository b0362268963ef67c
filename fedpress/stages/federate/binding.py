"""Builds the server and all simulated clients of a federate stage, which exchange messages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.errors import RecipeError
from fedpress.stages.federate.client import ClientSide, secret_of
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.deployed import bind_deployed
from fedpress.stages.federate.memories import memories_of
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import FederateSettings
from fedpress.transport.engine import LocalEngine
from fedpress.workspace.state import State


@dataclass(frozen=True, eq=False)
class Simulation:
    """The server and the simulated clients of a federate stage.

    Attributes:
        server: the server's side of the stage.
        clients: name -> simulated client; empty if the clients are on other machines. The server
            reaches the clients by messages only.
    """

    server: ServerSide
    clients: dict[ClientId, ClientSide]


def bind(stage: FederateSettings, state: State, folder: Path | None = None) -> Simulation:
    """Builds server and clients of the stage, and sends the messages by which they agree on it.

    Args:
        stage: the settings.
        state: the state of the run, with the data of all clients.
        folder: where clients store state between rounds, such as error feedback; None: in memory.

    Raises:
        RecipeError: if a setting does not fit.
        PrivacyError: if the budget cannot be kept.
        TrainingError: if clients on other machines do not accept, or a client does not register.
    """
    if state.network is not None:
        return Simulation(bind_deployed(stage, state, state.network, folder), {})
    if not state.data.clients:
        raise RecipeError(
            "the data set has no clients", place="federate", cure="set data.num_clients"
        )
    if stage.schedule.timed and stage.delays is None:
        raise RecipeError(
            "without simulated delays no client of a simulation is ever late",
            place="schedule.deadline",
            cure=(
                'set delays, for instance delays = { kind = "lognormal", median = 10.0 }, or '
                "leave deadline out"
            ),
        )
    # A function, because every other process that runs clients must call it too.
    build = partial(
        CommonInputs.of,
        stage,
        state.spec,
        state.model,
        preprocess=state.data.preprocess,
        task=state.data.task,
        seed=state.seed,
    )
    common = build(device=state.device)
    memories, own = memories_of(common, list(state.data.clients), folder)
    # Clients work one after another, so they can share one model. The server has its own, because a
    # model in which a client has trained contains private data.
    shared = common.copy()
    clients = {}
    for name, arrays in state.data.clients.items():
        clients[name] = ClientSide(name, arrays, shared, memories[name])
    engine = state.engine or LocalEngine()
    secure_noise = stage.privacy is not None and stage.privacy.secure_noise
    server = ServerSide.bind(
        common,
        engine.connect(clients, build),
        ledger=state.ledger,
        secret=secret_of(own) if secure_noise else None,
    )
    return Simulation(server, clients)
