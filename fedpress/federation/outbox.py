"""The open tasks of a run: what each working client was sent, and the request it will answer."""

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
    """The open requests of a run, by task.

    A client may work over several server steps, so the server must remember what it sent. Clients
    that were sent the same message share one object: as many models are in memory as there are
    versions at work, not as many as there are clients.
    """

    transport: Transport
    open: dict[Assignment, tuple[RequestId, Message]] = field(default_factory=dict)

    def send(self, assignment: Assignment, message: Message) -> None:
        """Sends the task to its client."""
        self.open[assignment] = self.transport.send(assignment.client, message), message

    def receive(
        self, waiting: Sequence[Assignment], patience: float | None
    ) -> tuple[Assignment, Message | None]:
        """Waits up to `patience` seconds for the next answer to one of `waiting`.

        Returns:
            The task and its answer; the first of `waiting` and None if nothing came in time.
        """
        tasks = {self.open[one][0]: one for one in waiting}
        answer = self.transport.receive(tasks, patience)
        if answer is None:
            # One is given up at a time: the caller then asks for the others, without waiting
            # longer.
            self.cancel(waiting[:1])
            return waiting[0], None
        _, request, reply = answer
        del self.open[tasks[request]]
        return tasks[request], reply

    def cancel(self, assignments: Collection[Assignment]) -> None:
        """Tells the clients of `assignments` to stop."""
        requests = []
        for one in assignments:
            # A task that was answered is not open any more.
            if one in self.open:
                request, _ = self.open.pop(one)
                requests.append(request)
        self.transport.cancel(requests)

    def cancel_all_but(self, wanted: Collection[Assignment]) -> list[ClientId]:
        """Cancels every open task that is not `wanted`; returns the clients of these tasks."""
        left = [one for one in self.open if one not in wanted]
        self.cancel(left)
        return [one.client for one in left]

    def state(self, at_work: Sequence[Assignment]) -> dict[str, Tensor]:
        """Returns what was sent to those `at_work`: headers, and each version's tensors once."""
        if not at_work:
            return {}
        headers = []
        tensors: dict[str, Tensor] = {}
        for one in at_work:
            message = self.open[one][1]
            headers.append(dict(message.header))
            # Named by task, which is the version of the model: clients of one version write the
            # same tensors under the same name.
            for name, tensor in message.tensors.items():
                tensors[f"{one.task}.{name}"] = tensor
        text = json.dumps(headers).encode()
        return {HEADERS: torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors}

    def load_(self, at_work: Sequence[Assignment], state: Mapping[str, Tensor]) -> None:
        """Sends the messages in `state` again, in the same order.

        A client that did answer before the kill gives the same answer to the same question.
        """
        if not at_work:
            return
        headers = json.loads(bytes(state[HEADERS].tolist()))
        made: dict[str, Message] = {}
        for one, header in zip(at_work, headers, strict=True):
            name = json.dumps(header)
            if name not in made:
                made[name] = Message("fit", header, _of_task(state, one.task))
            self.send(one, made[name])


def _of_task(state: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """Returns the tensors of one version, without the version in their names."""
    prefix = f"{task}."
    tensors = {}
    for full, tensor in state.items():
        if full.startswith(prefix):
            tensors[full.removeprefix(prefix)] = tensor
    return tensors
