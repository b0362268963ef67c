"""A process of a Ray cluster that runs simulated clients and answers the requests to them.

Ray calls such a process an actor; `Host` is the class that runs in it. The code of one client is
its side (`Side`): an object that answers the server's requests to this client.

A client's stored state comes back with its answer, and the server's process writes it into the run
folder. So a run can be resumed on other machines, and a client whose actor was killed continues in
another actor.
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
from fedpress.errors import DivergedError
from fedpress.federation import ClientState, InMemoryState
from fedpress.federation.exchange import failure
from fedpress.federation.local import Outcome
from fedpress.federation.stacked import Training
from fedpress.wire.message import Message, pack


class Side(Protocol):
    """Answers the server's requests to one client in one stage, such as `ClientSide`.

    Attributes:
        common: inputs that are equal for all clients, such as the model.
        memory: where the client stores its state between rounds.
    """

    common: Any
    memory: ClientState

    @property
    def num_examples(self) -> int:
        """Number of the client's examples, by which its work is estimated."""
        ...

    def recall(self) -> None:
        """Reads from `memory` what this client has answered, perhaps in another process."""
        ...

    def handle(self, request: bytes) -> bytes:
        """Returns the bytes of the answer to one message, or raises."""
        ...

    def training(self, message: Message) -> Training:
        """Returns the training that a "fit" request asks for, without taking it, or raises."""
        ...

    def answer_trained(self, message: Message, outcome: Outcome | DivergedError) -> Message:
        """Does the same as `answer` for a "fit" request whose training has this outcome."""
        ...

    def answer(self, message: Message) -> Message:
        """Does the same as `handle`, for messages that need not become bytes, or raises.

        The answer may share memory with `message` and with what the client stores, so the caller
        does not change it in place.
        """
        ...


@dataclass(frozen=True)
class Write:
    """One write of a client into its stored state: the state after a round, or a named entry.

    Attributes:
        round: number of the round; None for a named entry.
        entry: name of the entry; empty for the state after a round.
        tensors: the stored tensors.
    """

    round: int | None
    entry: str
    tensors: dict[str, Tensor]

    def store(self, memory: ClientState) -> None:
        """Makes the same write in `memory`."""
        if self.round is None:
            memory.save_entry(self.entry, self.tensors)
        else:
            memory.save(self.round, self.tensors)


@dataclass(eq=False)
class RecordedState:
    """A client's stored state, in memory (see `ClientState`). It also records all writes.

    Attributes:
        stored: the state.
        writes: writes since the last call of `taken`.

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
        """Returns all writes since the last call of `taken`."""
        writes = self.writes
        self.writes = []
        return writes


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies of tensors, each with its own storage."""
    # A view of a larger tensor would be pickled with the whole larger tensor.
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@dataclass(frozen=True)
class Stored:
    """What a client needs to continue in a new actor.

    Attributes:
        memory: the client's stored state.
        set_up: earlier messages that a new process must handle again: the agreement (names all
            clients of the run), and the roster of a secure sum (has the clients' public keys).
    """

    memory: InMemoryState
    set_up: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An actor's result for one request.

    Attributes:
        data: bytes of the answer.
        writes: what the client stored while it worked on the request.
    """

    data: bytes
    writes: tuple[Write, ...] = ()


class Host:
    """The object in an actor's process: runs some clients, and handles one call at a time."""

    def __init__(self) -> None:
        self._common: Any = None
        self._sides: dict[ClientId, Any] = {}
        self._running: dict[ClientId, tuple[Side, RecordedState]] = {}

    def versions(self) -> dict[str, str]:
        """Returns the versions that must be equal in all processes; see `versions` below."""
        return versions()

    def load(self, build: bytes, sides: bytes, *, device: str, threads: int) -> str:
        """Loads the clients of this actor.

        Args:
            build: pickled function that creates the inputs that all sides share:
                `build(device=...)`.
            sides: pickled dictionary: client name -> side without `common` and `memory`.
            device: the device on which the clients train, "cpu" or "cuda".
            threads: number of threads of torch. It decides the order in which floats are added, and
                so the exact bits of results.

        Returns:
            Why loading failed; empty if it succeeded.
        """
        torch.set_num_threads(threads)
        if device != "cpu" and not torch.cuda.is_available():
            return "torch finds no GPU there"
        # Any exception, because unpickling a user's model imports the user's modules, which can
        # raise anything.
        try:
            self._sides = pickle.loads(sides)
            self._common = pickle.loads(build)(device=torch.device(device))
        except Exception as problem:
            return f"{type(problem).__name__}: {problem}"
        return ""

    def answer(self, client: ClientId, request: bytes, stored: Stored | None = None) -> Reply:
        """Answers a request to a client. An exception becomes an answer of kind "error".

        Args:
            client: name of the client.
            request: bytes of the message.
            stored: state from which the client starts; None: the client continues from its last
                request in this actor.
        """
        if stored is not None:
            self._begin(client, stored)
        side, memory = self._running[client]
        try:
            data = side.handle(request)
        # Sent as an answer: a client that fails must not end the run.
        except Exception as problem:
            data = pack(failure(problem))
        return Reply(data, tuple(memory.taken()))

    def _begin(self, client: ClientId, stored: Stored) -> None:
        """Puts a client into the state that it had in another process."""
        memory = RecordedState(stored.memory)
        side: Side = replace(self._sides[client], common=self._common, memory=memory)
        for message in stored.set_up:
            # Answers and errors are ignored: they were sent the first time, and are the same now.
            with suppress(Exception):
                side.handle(message)
        self._running[client] = side, memory


def versions() -> dict[str, str]:
    """Returns the versions of fedpress, torch and the random streams.

    With other versions the same run may give other bits, so they must be equal in all processes.
    """
    return {"fedpress": __version__, "streams": str(STREAMS), "torch": torch.__version__}
