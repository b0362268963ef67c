"""The simulation: builds the server's half and every client's half in this process, and hands neither the other's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.errors import RecipeError
from fedpress.federation import ClientState, DiskState, InMemoryState
from fedpress.stages.federate.client import ClientHalf, secret_of
from fedpress.stages.federate.contract import CommonInputs
from fedpress.stages.federate.server import ServerHalf
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

    server: ServerHalf
    clients: dict[ClientId, ClientHalf]


def bind(stage: FederateSettings, state: State, folder: Path | None = None) -> Simulation:
    """Builds both halves and lets them agree.

    `folder` is where clients keep what must outlive a round and a process; in memory without one.

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
    # One model for all clients, who work one after another, and another for the server.
    shared = common.copy()
    clients = {
        name: ClientHalf(name, arrays, shared, memories[name])
        for name, arrays in state.data.clients.items()
    }
    drawn = stage.privacy is not None and stage.privacy.secure_noise
    server = ServerHalf.bind(
        common,
        LocalTransport({name: client.handle for name, client in clients.items()}),
        ledger=state.ledger,
        secret=secret_of(own) if drawn else None,
    )
    return Simulation(server, clients)


def memories_of(
    common: CommonInputs, clients: Sequence[ClientId], folder: Path | None
) -> tuple[dict[ClientId, ClientState], ClientState]:
    """Returns where each client, and the server, keeps what must outlive a process.

    The server's is not one of the table: a client may be called "server", and would share its
    secret.
    """
    if folder is None:
        return {name: InMemoryState() for name in clients}, InMemoryState()
    place = _place(common, clients, folder)
    return {name: DiskState(place / f"{at:05d}") for at, name in enumerate(clients)}, DiskState(
        place / SERVER
    )


def _place(common: CommonInputs, clients: Sequence[ClientId], folder: Path) -> Path:
    """Returns the folder of the memories of this stage, set aside by its settings, its seed and its clients.

    A run of an older version called it by another name. A run that goes on has the settings with
    which it began (see `RunFolder.resume`), and memories without a checkpoint are removed, so the
    only folder that is there is this one.
    """
    settings = json.loads(common.stage.model_dump_json(exclude_defaults=True))
    text = json.dumps([settings, common.seed, list(clients)], sort_keys=True)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    found = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return found[0] if len(found) == 1 else place
