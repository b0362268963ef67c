"""A client's storage between rounds, in memory or in a folder.

Examples of its content: the residual of error feedback, the client's copy of the model, and the
rounds that the client has answered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedpress.core import checksums
from fedpress.core.files import replacing, writing
from fedpress.errors import Argument, RunError

JSON_TENSOR = "json"
"""Name of the uint8 tensor with the JSON text of an entry."""
COMPACT_EVERY = 64
"""The list of checksums is compacted in every 64th round, because every save appends a line."""
MAX_STATES = 2
"""Number of stored states: of the last two rounds. A server that was stopped in the last round
repeats this round, and the client then needs the older state."""


class ClientState(Protocol):
    """One client's storage.

    It holds the client's state (named tensors) after each of its last two rounds, and entries that
    belong to no round, such as the list of answered rounds.
    """

    def load(self, round: int) -> dict[str, Tensor]:
        """Returns the state after the latest stored round before `round`; empty if there is none.

        So a round that is repeated starts from the same state as the first time.
        """
        ...

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Stores the state after `round`, and deletes the states of later rounds."""
        ...

    def entry(self, name: str) -> dict[str, Tensor]:
        """Returns the entry `name`; empty if there is none."""
        ...

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Stores the entry `name`, or replaces it."""
        ...

    def copied(self) -> InMemoryState:
        """Returns a copy of all states and entries, for a client that moves to another process."""
        ...


def load_json(memory: ClientState, name: str) -> dict[str, Any]:
    """Returns the JSON object in the entry `name`; empty if there is none."""
    tensors = memory.entry(name)
    if not tensors:
        return {}
    found: dict[str, Any] = json.loads(bytes(tensors[JSON_TENSOR].tolist()))
    return found


def save_json(memory: ClientState, name: str, value: Mapping[str, Any]) -> None:
    """Stores a JSON object as the entry `name`, or replaces it."""
    text = bytearray(json.dumps(value).encode())
    memory.save_entry(name, {JSON_TENSOR: torch.frombuffer(text, dtype=torch.uint8)})


@dataclass(eq=False)
class InMemoryState:
    """Storage in memory; it is lost when the process ends.

    Attributes:
        rounds: round -> the state after this round.
        notes: name of an entry -> its tensors.

    >>> memory = InMemoryState()
    >>> memory.save(3, {})
    >>> memory.load(3), sorted(memory.rounds)
    ({}, [3])
    """

    rounds: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`."""
        before = [r for r in self.rounds if r < round]
        return dict(self.rounds[max(before)]) if before else {}

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        # States of `round` and of later rounds are dropped: the server has gone back to `round`.
        before = sorted(r for r in self.rounds if r < round)[-(MAX_STATES - 1) :]
        self.rounds = {r: self.rounds[r] for r in before} | {round: dict(state)}

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        return dict(self.notes.get(name, {}))

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.notes[name] = dict(state)

    def copied(self) -> InMemoryState:
        """See `ClientState`."""
        return InMemoryState(dict(self.rounds), dict(self.notes))


@dataclass(frozen=True)
class DiskState:
    """Storage in a folder, for clients that may be restarted.

    Every file is replaced atomically, so a crash leaves the old file or the new one.

    Attributes:
        folder: holds one file for each state (`12.safetensors`) and each entry
            (`note-answered.safetensors`).
    """

    folder: Path

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`.

        Raises:
            RunError: if the file is damaged.
        """
        before = [r for r in self._rounds() if r < round]
        return self._read(f"{before[-1]}") if before else {}

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        # Written before old states are deleted: a crash in between leaves a state too many, which
        # does no harm.
        self._write(f"{round}", state)
        rounds = self._rounds()
        keep = [r for r in rounds if r <= round][-MAX_STATES:]
        for gone in set(rounds) - set(keep):
            self._path(f"{gone}").unlink(missing_ok=True)
        if round % COMPACT_EVERY == 0:
            checksums.compact(self.folder)

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`.

        Raises:
            RunError: if the file is damaged.
        """
        return self._read(f"note-{name}") if self._path(f"note-{name}").exists() else {}

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self._write(f"note-{name}", state)

    def copied(self) -> InMemoryState:
        """See `ClientState`.

        Raises:
            RunError: if a file is damaged.
        """
        rounds = {number: self._read(f"{number}") for number in self._rounds()}
        names = [path.stem.removeprefix("note-") for path in self.folder.glob("note-*.safetensors")]
        return InMemoryState(rounds, {name: self._read(f"note-{name}") for name in names})

    def _path(self, stem: str) -> Path:
        return self.folder / f"{stem}.safetensors"

    def _rounds(self) -> list[int]:
        """Returns the rounds whose states are stored, in order."""
        rounds = []
        for path in self.folder.glob("*.safetensors"):
            # The folder also has the files of entries, such as `note-answered.safetensors`.
            if found := re.fullmatch(r"(\d+)\.safetensors", path.name):
                rounds.append(int(found[1]))
        return sorted(rounds)

    def _read(self, stem: str) -> dict[str, Tensor]:
        """Reads a file after comparing it with its checksum."""
        path = self._path(stem)
        cure = "delete the file, and the server sends the full model"
        try:
            if fault := checksums.fault(path):
                raise RunError(f"stored client state is damaged ({fault})", place=path, cure=cure)
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"stored client state is damaged ({error})", place=path, cure=cure
            ) from error

    def _write(self, stem: str, state: Mapping[str, Tensor]) -> None:
        """Writes a file and its checksum."""
        path = self._path(stem)
        # safetensors refuses tensors that are not contiguous or share memory.
        tensors = {name: t.contiguous().clone() for name, t in state.items()}
        cure = ("free some space, then go on with ", Argument("resume"))
        with writing(path, full=cure, other=cure):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Not synced to disk, which would be slow in every round. After a power cut the state
            # may be lost; the server then sends the full model.
            with replacing(path, durable=False) as part:
                save_file(tensors, part)
                checksums.add_line(path, part, sync=False)
