"""Tasks on their way: which message each client at work was sent, and under which request its answer comes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.federation.exchange import RequestId, Transport
from fedpress.federation.schedules import Assignment
from fedpress.wire.message import Message

HEADERS = "headers"


@dataclass(eq=False)
class Outbox:
    """The open requests of a run, by the task that each is for.

    What a server must remember of clients that work over several server steps is what it sent to
    them. Clients that were sent the same message share it, so as many models are held as there are
    versions at work.
    """

    transport: Transport
    open: dict[Assignment, tuple[RequestId, Message]] = field(default_factory=dict)

    def send(self, assignment: Assignment, message: Message) -> None:
        """Sends the task to its client."""
        self.open[assignment] = self.transport.send(assignment.client, message), message

    def receive(
        self, waiting: Sequence[Assignment], patience: float | None
    ) -> tuple[Assignment, Message | None]:
        """Returns the next answer to one of `waiting`; None for the first of them if nothing came in time."""
        tasks = {self.open[one][0]: one for one in waiting}
        answer = self.transport.receive(tasks, patience)
        if answer is None:
            self.cancel(waiting[:1])
            return waiting[0], None
        _, request, reply = answer
        del self.open[tasks[request]]
        return tasks[request], reply

    def cancel(self, assignments: Collection[Assignment]) -> None:
        """Tells the clients of `assignments` to stop."""
        self.transport.cancel([self.open.pop(one)[0] for one in assignments if one in self.open])

    def cancel_all_but(self, wanted: Collection[Assignment]) -> list[ClientId]:
        """Cancels what is not `wanted` any more; returns whose tasks these were."""
        left = [one for one in self.open if one not in wanted]
        self.cancel(left)
        return [one.client for one in left]

    def state(self, at_work: Sequence[Assignment]) -> dict[str, Tensor]:
        """Returns the messages of those `at_work`: their headers, and the tensors of each version once."""
        if not at_work:
            return {}
        headers = []
        tensors: dict[str, Tensor] = {}
        for one in at_work:
            message = self.open[one][1]
            headers.append(dict(message.header))
            for name, tensor in message.tensors.items():
                tensors[f"{one.task}.{name}"] = tensor
        text = json.dumps(headers).encode()
        return {HEADERS: torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors}

    def load_(self, at_work: Sequence[Assignment], state: Mapping[str, Tensor]) -> None:
        """Sends what `state` holds again, in the same order: the same question gets the same answer."""
        if not at_work:
            return
        headers = json.loads(bytes(state[HEADERS].tolist()))
        made: dict[str, Message] = {}
        for one, header in zip(at_work, headers, strict=True):
            name = json.dumps(header)
            if name not in made:
                prefix = f"{one.task}."
                tensors = {
                    full.removeprefix(prefix): tensor
                    for full, tensor in state.items()
                    if full.startswith(prefix)
                }
                made[name] = Message("fit", header, tensors)
            self.send(one, made[name])
