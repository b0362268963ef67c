"""Creates the storage in which server and simulated clients keep state between rounds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from fedpress.core.names import ClientId
from fedpress.federation import ClientState, DiskState, InMemoryState
from fedpress.stages.federate.contract import CommonInputs

SERVER = "server"
"""Name of the folder of the server's storage."""


def memories_of(
    common: CommonInputs, clients: Sequence[ClientId], folder: Path | None
) -> tuple[dict[ClientId, ClientState], ClientState]:
    """Returns the storage of each client by name, and the storage of the server.

    The server's storage is not in the dictionary, because a client named "server" could then read
    the server's secret.

    Args:
        common: settings and seed of the stage, which select the folder.
        clients: names of the clients.
        folder: folder for all storage; None: everything is kept in memory.
    """
    if folder is None:
        return {name: InMemoryState() for name in clients}, InMemoryState()
    place = _place(common, clients, folder)
    memories: dict[ClientId, ClientState] = {}
    for index, name in enumerate(clients):
        # By number, because a client's name may contain characters that file names cannot.
        memories[name] = DiskState(place / f"{index:05d}")
    return memories, DiskState(place / SERVER)


def _place(common: CommonInputs, clients: Sequence[ClientId], folder: Path) -> Path:
    """Returns the folder for this stage's storage; its name is a hash of settings, seed, clients.

    If `folder` contains exactly one folder, this folder is used whatever its name, because older
    versions computed other names. It cannot belong to another stage: a resumed run has its original
    settings (see `RunFolder.resume`), and storage without a checkpoint is removed.
    """
    # Without defaults, so that a key of a new version does not change the name.
    settings = json.loads(common.stage.model_dump_json(exclude_defaults=True))
    text = json.dumps([settings, common.seed, list(clients)], sort_keys=True)
    place = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not folder.is_dir():
        return place
    found = [path for path in folder.iterdir() if path.is_dir()]
    return found[0] if len(found) == 1 else place
