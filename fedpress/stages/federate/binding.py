"""The simulation: server and all clients in this process, which share nothing but messages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.errors import RecipeError
from fedpress.federation import ClientState, DiskState, InMemoryState
from fedpress.stages.federate.client import ClientSide, secret_of
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.server import ServerSide
from fedpress.stages.federate.settings import FederateSettings
from fedpress.transport import LocalTransport
from fedpress.workspace.state import State

SERVER = "server"


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


def memories_of(
    common: CommonInputs, clients: Sequence[ClientId], folder: Path | None
) -> tuple[dict[ClientId, ClientState], ClientState]:
    """Returns the storage of each client by name, and that of the server.

    They are apart, because a client may be called "server" and would share the server's secret.
    """
    if folder is None:
        return {name: InMemoryState() for name in clients}, InMemoryState()
    place = _place(common, clients, folder)
    memories: dict[ClientId, ClientState] = {}
    for index, name in enumerate(clients):
        # By number: a client's name may hold characters that no file name can.
        memories[name] = DiskState(place / f"{index:05d}")
    return memories, DiskState(place / SERVER)


def _place(common: CommonInputs, clients: Sequence[ClientId], folder: Path) -> Path:
    """Returns the folder of this stage's storage, named by settings, seed and clients.

    An older version may have given it another name. If there is exactly one folder it is taken
    whatever its name: a resumed run has the settings with which it began (see `RunFolder.resume`),
    and storage without a checkpoint is removed, so it can be no other stage's.
    """
    # Without defaults: a key that a new version adds must not change the name.
    settings = json.loads(common.stage.model_dump_json(exclude_defaults=True))
    text = json.dumps([settings, common.seed, list(clients)], sort_keys=True)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not folder.is_dir():
        return place
    found = [path for path in folder.iterdir() if path.is_dir()]
    return found[0] if len(found) == 1 else place
