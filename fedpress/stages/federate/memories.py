"""Where the server and simulated clients store what must outlive a round and a process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.federation import ClientState, DiskState, InMemoryState
from fedpress.stages.federate.contract import CommonInputs

SERVER = "server"


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
