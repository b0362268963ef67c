"""What a client keeps between rounds: its error feedback, the model it holds, the secrets of the secure sum."""

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
from fedpress.errors import RunError

JSON_TENSOR = "json"
LONG = 64  # rounds after which the list of checksums is made short again
KEPT = 2
"""States that are kept: the last may belong to a round that the server never finished and asks for again."""


class ClientState(Protocol):
    """One client's memory: a state after each round, of which the last two can be asked for, and lasting notes."""

    def load(self, round: int) -> dict[str, Tensor]:
        """Returns the state that the client had before `round`; empty at the beginning."""
        ...

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Keeps the state after `round` and forgets later ones."""
        ...

    def entry(self, name: str) -> dict[str, Tensor]:
        """Returns what was last noted under `name`, whatever the round; empty at the beginning."""
        ...

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Replaces the note `name`."""
        ...


def load_json(memory: ClientState, name: str) -> dict[str, Any]:
    """Returns the JSON object noted under `name`; empty at the beginning."""
    note = memory.entry(name)
    found: dict[str, Any] = json.loads(bytes(note[JSON_TENSOR].tolist())) if note else {}
    return found


def save_json(memory: ClientState, name: str, value: Mapping[str, Any]) -> None:
    """Notes a JSON object under `name`."""
    text = bytearray(json.dumps(value).encode())
    memory.save_entry(name, {JSON_TENSOR: torch.frombuffer(text, dtype=torch.uint8)})


@dataclass(eq=False)
class InMemoryState:
    """A memory that ends with the process.

    >>> memory = InMemoryState()
    >>> memory.save(3, {})
    >>> memory.load(3), sorted(memory.rounds)
    ({}, [3])
    """

    rounds: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`."""
        return dict(self.rounds.get(max((r for r in self.rounds if r < round), default=0), {}))

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        before = sorted(r for r in self.rounds if r < round)[-(KEPT - 1) :]
        self.rounds = {r: self.rounds[r] for r in before} | {round: dict(state)}

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        return dict(self.notes.get(name, {}))

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.notes[name] = dict(state)


@dataclass(frozen=True)
class DiskState:
    """A memory in a folder, so that a client that starts again goes on; each file is replaced in one step."""

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
        self._write(f"{round}", state)
        rounds = self._rounds()
        keep = [r for r in rounds if r <= round][-KEPT:]
        for gone in set(rounds) - set(keep):
            self._path(f"{gone}").unlink(missing_ok=True)
        if round % LONG == 0:
            checksums.tidy(self.folder)

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        return self._read(f"note-{name}") if self._path(f"note-{name}").exists() else {}

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self._write(f"note-{name}", state)

    def _path(self, stem: str) -> Path:
        return self.folder / f"{stem}.safetensors"

    def _rounds(self) -> list[int]:
        names = (
            re.fullmatch(r"(\d+)\.safetensors", p.name) for p in self.folder.glob("*.safetensors")
        )
        return sorted(int(found[1]) for found in names if found)

    def _read(self, stem: str) -> dict[str, Tensor]:
        path = self._path(stem)
        cure = "delete it, and the server sends the whole model"
        try:
            if fault := checksums.fault(path):
                raise RunError(
                    f"this memory of a client is damaged ({fault})", place=path, cure=f"{cure}"
                )
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(
                f"this memory of a client is damaged ({error})", place=path, cure=f"{cure}"
            ) from error

    def _write(self, stem: str, state: Mapping[str, Tensor]) -> None:
        path = self._path(stem)
        tensors = {name: t.contiguous().clone() for name, t in state.items()}
        cure = "free some space, then go on with --resume"
        with writing(path, full=cure, other=cure):
            self.folder.mkdir(parents=True, exist_ok=True)
            # A power cut may lose what a client has remembered, as it loses the client.
            with replacing(path, durable=False) as part:
                save_file(tensors, part)
                checksums.note(path, part, sync=False)
