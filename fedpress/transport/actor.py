"""One process of a cluster: holds the sides of its clients, and answers requests to them.

A client's side (`Side`) is its part of a stage: it answers what the server asks the client.

What a client stores between rounds comes back with its answer, and the process of the server stores
it in the run folder. So a run can be resumed on other machines, and a client whose process was
killed goes on in another one.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fedpress import __version__
from fedpress.core.names import ClientId
from fedpress.core.random import STREAMS
from fedpress.federation import ClientState, InMemoryState
from fedpress.federation.exchange import failure
from fedpress.wire.message import pack


class Side(Protocol):
    """A client's part of a stage, which answers the server's requests; `ClientSide` is one.

    Attributes:
        common: inputs that are equal for all clients, such as the model.
        memory: where the client stores its state between rounds.
    """

    common: Any
    memory: ClientState

    def handle(self, request: bytes) -> bytes:
        """Answers one message, or raises."""
        ...


@dataclass(frozen=True)
class Write:
    """Something that a client has stored: the state after a round, or a named entry.

    Attributes:
        round: None for an entry.
        entry: name of the entry; empty for a state.
        tensors: what was stored.
    """

    round: int | None
    entry: str
    tensors: dict[str, Tensor]

    def store(self, memory: ClientState) -> None:
        """Repeats this write in another `memory`."""
        if self.round is None:
            memory.save_entry(self.entry, self.tensors)
        else:
            memory.save(self.round, self.tensors)


@dataclass(eq=False)
class RecordedState:
    """A client's storage in memory (see `ClientState`) that remembers what was written.

    >>> memory = RecordedState(InMemoryState())
    >>> memory.save(3, {})
    >>> [write.round for write in memory.taken()], memory.taken()
    ([3], [])
    """

    stored: InMemoryState
    writes: list[Write] = field(default_factory=list)

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`."""
        return self.stored.load(round)

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.stored.save(round, state)
        self.writes.append(Write(round, "", _own(state)))

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        return self.stored.entry(name)

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.stored.save_entry(name, state)
        self.writes.append(Write(None, name, _own(state)))

    def copied(self) -> InMemoryState:
        """See `ClientState`."""
        return self.stored.copied()

    def taken(self) -> list[Write]:
        """Returns what was written since the last call."""
        writes = self.writes
        self.writes = []
        return writes


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A part of a larger tensor would be pickled with all of it.
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@dataclass(frozen=True)
class Stored:
    """What a client needs to go on in a new process.

    Attributes:
        memory: what the client has stored.
        set_up: earlier messages to the client that a new process must know: the agreement, and
            the roster of a secure sum.
    """

    memory: InMemoryState
    set_up: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Reply:
    """What an actor returns for one request: the answer's bytes, and what the client stored."""

    data: bytes
    writes: tuple[Write, ...] = ()


class Host:
    """Runs in an actor's process; one call at a time."""

    def __init__(self) -> None:
        self._common: Any = None
        self._sides: dict[ClientId, Any] = {}
        self._running: dict[ClientId, tuple[Side, RecordedState]] = {}

    def versions(self) -> dict[str, str]:
        """Returns what must be equal in all processes, because bits depend on it."""
        return versions()

    def load(self, build: bytes, sides: bytes, *, device: str, threads: int) -> str:
        """Loads the clients of this actor.

        Args:
            build: pickled function that makes what all sides share: `build(device=...)`.
            sides: pickled dictionary, name -> side without `common` and `memory`.
            device: where the clients train.
            threads: threads of torch. Bits depend on it.

        Returns:
            Why loading failed; empty if it did not.
        """
        torch.set_num_threads(threads)
        if device != "cpu" and not torch.cuda.is_available():
            return "torch finds no GPU there"
        # Any exception, because pickles of a user's model import the user's modules.
        try:
            self._sides = pickle.loads(sides)
            self._common = pickle.loads(build)(device=torch.device(device))
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return ""

    def answer(self, client: ClientId, request: bytes, stored: Stored | None = None) -> Reply:
        """Answers a request as the local transport does.

        Args:
            client: name of the client.
            request: bytes of the message.
            stored: where the client begins; None: it goes on from its last request here.
        """
        if stored is not None:
            self._begin(client, stored)
        side, memory = self._running[client]
        try:
            data = side.handle(request)
        # A client that fails must not end the run.
        except Exception as problem:
            data = pack(failure(problem))
        return Reply(data, tuple(memory.taken()))

    def _begin(self, client: ClientId, stored: Stored) -> None:
        """Brings a client to where it was in another process."""
        memory = RecordedState(stored.memory)
        side: Side = replace(self._sides[client], common=self._common, memory=memory)
        for message in stored.set_up:
            # The answer, which may be a refusal, is the same as the first time, and was sent then.
            with suppress(Exception):
                side.handle(message)
        self._running[client] = side, memory


def versions() -> dict[str, str]:
    """Returns the versions on which the bits of a run depend."""
    return {"fedpress": __version__, "streams": str(STREAMS), "torch": torch.__version__}
