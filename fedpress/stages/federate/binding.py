"""The simulation: server and all clients in this process, which share nothing but messages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.errors import RecipeError
from fedpress.stages.federate.client import ClientSide, secret_of
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.deployed import bind_deployed
from fedpress.stages.federate.memories import memories_of
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import FederateSettings
from fedpress.transport import LocalTransport
from fedpress.workspace.state import State


@dataclass(frozen=True, eq=False)
class Simulation:
    """Both halves of a federate stage.

    Attributes:
        server: the server's half.
        clients: the clients' halves, by name; the server reaches them through messages alone.
    """

    server: ServerSide
    clients: dict[ClientId, ClientSide]


def bind(stage: FederateSettings, state: State, folder: Path | None = None) -> Simulation:
    """Builds both halves and lets them agree.

    Args:
        stage: the settings.
        state: of the run, with the data of all clients.
        folder: where clients store what must outlive a round and a process; in memory if None.

    Raises:
        RecipeError: naming the setting that does not fit, and the cure.
        PrivacyError: if the budget cannot be kept.
    """
    if state.network is not None:
        return Simulation(bind_deployed(stage, state, state.network, folder), {})
    if not state.data.clients:
        raise RecipeError(
            "the data set has no clients", place="federate", cure="set data.num_clients"
        )
    if stage.schedule.timed and stage.delays is None:
        raise RecipeError(
            "in a simulation nobody is late without a clock",
            place="schedule.deadline",
            cure=(
                'set delays, for instance delays = { kind = "lognormal", median = 10.0 }, or '
                "leave deadline out"
            ),
        )
    common = CommonInputs.of(
        stage,
        state.spec,
        state.model,
        preprocess=state.data.preprocess,
        task=state.data.task,
        seed=state.seed,
        device=state.device,
    )
    memories, own = memories_of(common, list(state.data.clients), folder)
    # Clients work one after another, so one model is enough for all. The server gets another: it
    # must not see one in which a client has trained.
    shared = common.copy()
    clients = {}
    for name, arrays in state.data.clients.items():
        clients[name] = ClientSide(name, arrays, shared, memories[name])
    secure_noise = stage.privacy is not None and stage.privacy.secure_noise
    server = ServerSide.bind(
        common,
        LocalTransport({name: client.handle for name, client in clients.items()}),
        ledger=state.ledger,
        secret=secret_of(own) if secure_noise else None,
    )
    return Simulation(server, clients)
