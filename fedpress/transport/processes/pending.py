"""A client's storage while a worker answers a request: reads the real one, and only notes writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedpress.federation import ClientState, InMemoryState
from fedpress.transport.actor import Write


@dataclass(eq=False)
class PendingState:
    """See `ClientState`. Writes are noted, and what was noted is read before what is stored.

    The server's process makes the writes when it takes the answer. So an answer that nobody takes
    leaves no trace.

    Attributes:
        stored: the real storage; it is not changed.
        writes: the noted writes, in order.

    >>> import torch
    >>> stored = InMemoryState({3: {}, 4: {}})
    >>> memory = PendingState(stored)
    >>> memory.save(4, {"residual": torch.ones(1)})
    >>> memory.load(5), sorted(stored.load(5))
    ({'residual': tensor([1.])}, [])
    """

    stored: ClientState
    writes: list[Write] = field(default_factory=list)

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`."""
        # The newest suitable write: a later write of an earlier round has deleted those before it.
        for write in reversed(self.writes):
            if write.round is not None and write.round < round:
                return dict(write.tensors)
        return self.stored.load(round)

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.writes.append(Write(round, "", dict(state)))

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        for write in reversed(self.writes):
            if write.round is None and write.entry == name:
                return dict(write.tensors)
        return self.stored.entry(name)

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.writes.append(Write(None, name, dict(state)))

    def copied(self) -> InMemoryState:
        """See `ClientState`."""
        copy = self.stored.copied()
        for write in self.writes:
            write.store(copy)
        return copy


@dataclass(eq=False)
class SwitchedState:
    """A storage in the place of which another one can be put, see `ClientState`.

    A client keeps its storage for the whole stage. In a worker, each request needs a new
    `PendingState`.

    Attributes:
        target: the storage that is read and written.
    """

    target: ClientState

    def load(self, round: int) -> dict[str, Tensor]:
        """See `ClientState`."""
        return self.target.load(round)

    def save(self, round: int, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.target.save(round, state)

    def entry(self, name: str) -> dict[str, Tensor]:
        """See `ClientState`."""
        return self.target.entry(name)

    def save_entry(self, name: str, state: Mapping[str, Tensor]) -> None:
        """See `ClientState`."""
        self.target.save_entry(name, state)

    def copied(self) -> InMemoryState:
        """See `ClientState`."""
        return self.target.copied()
