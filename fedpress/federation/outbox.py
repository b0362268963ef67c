"""The tasks that were sent to clients and are not answered yet.

A task is one training of one client, starting from one version of the model.
"""

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
"""Name of the tensor with the headers of all open tasks: a JSON list in UTF-8."""


@dataclass(eq=False)
class Outbox:
    """The unanswered tasks of a run, with their messages.

    A client may work longer than one server step, so the server must remember the message that it
    sent to the client. Clients with the same message share one object. Example: with 100 clients at
    work on 3 versions of the model, 3 models are in memory, not 100.

    Attributes:
        transport: carries messages to the clients.
        open: task -> id of its request, and its message.
    """

    transport: Transport
    open: dict[Assignment, tuple[RequestId, Message]] = field(default_factory=dict)

    def send(self, assignment: Assignment, message: Message) -> None:
        """Sends the message of a task to its client."""
        self.open[assignment] = self.transport.send(assignment.client, message), message

    def receive(
        self, waiting: Sequence[Assignment], patience: float | None
    ) -> tuple[Assignment, Message | None]:
        """Waits for an answer to one of the tasks in `waiting`.

        Args:
            waiting: open tasks.
            patience: seconds to wait; None: without limit.

        Returns:
            The task and its answer. If no answer comes in time, the first task of `waiting` is
            cancelled, and returned with None.
        """
        tasks = {self.open[one][0]: one for one in waiting}
        answer = self.transport.receive(tasks, patience)
        if answer is None:
            # Only one task is cancelled in each call: the caller calls again for the other tasks,
            # and learns of each whether it was answered.
            self.cancel(waiting[:1])
            return waiting[0], None
        _, request, reply = answer
        del self.open[tasks[request]]
        return tasks[request], reply

    def cancel(self, assignments: Collection[Assignment]) -> None:
        """Cancels tasks: their clients may stop, and their answers are dropped."""
        requests = []
        for one in assignments:
            # The caller may name tasks that were answered meanwhile: they are not open.
            if one in self.open:
                request, _ = self.open.pop(one)
                requests.append(request)
        self.transport.cancel(requests)

    def cancel_all_but(self, wanted: Collection[Assignment]) -> list[ClientId]:
        """Cancels every open task that is not in `wanted`; returns the clients of these tasks."""
        left = [one for one in self.open if one not in wanted]
        self.cancel(left)
        return [one.client for one in left]

    def state(self, at_work: Sequence[Assignment]) -> dict[str, Tensor]:
        """Returns the messages of the tasks in `at_work`, to be stored in a checkpoint.

        Returns:
            The tensor `headers` (JSON, one header for each task), and the tensors of each version
            of the model once, named `<version>.<name>`. Example: `3.params`. Empty if there are no
            tasks.
        """
        if not at_work:
            return {}
        headers = []
        tensors: dict[str, Tensor] = {}
        for one in at_work:
            message = self.open[one][1]
            headers.append(dict(message.header))
            # `task` is the model version. Clients that work on one version have the same tensors,
            # so each version is stored once.
            for name, tensor in message.tensors.items():
                tensors[f"{one.task}.{name}"] = tensor
        text = json.dumps(headers).encode()
        return {HEADERS: torch.frombuffer(bytearray(text), dtype=torch.uint8), **tensors}

    def load_(self, at_work: Sequence[Assignment], state: Mapping[str, Tensor]) -> None:
        """Sends the messages of a checkpoint again, in the same order.

        A client that had answered before the server stopped gives the same answer again.

        Args:
            at_work: the tasks that were open.
            state: the result of `state` for these tasks.
        """
        if not at_work:
            return
        headers = json.loads(bytes(state[HEADERS].tolist()))
        made: dict[str, Message] = {}
        for one, header in zip(at_work, headers, strict=True):
            # Tasks with equal headers had the same message, so they share one object again.
            name = json.dumps(header)
            if name not in made:
                made[name] = Message("fit", header, _of_task(state, one.task))
            self.send(one, made[name])


def _of_task(state: Mapping[str, Tensor], task: int) -> dict[str, Tensor]:
    """Returns the tensors of model version `task`. Example: `3.params` becomes `params`."""
    prefix = f"{task}."
    tensors = {}
    for full, tensor in state.items():
        if full.startswith(prefix):
            tensors[full.removeprefix(prefix)] = tensor
    return tensors
