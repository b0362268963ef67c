"""The transport of simulations that trains several clients in one program, as one stack.

The other transports end in the same bits. This one ends in the same numbers up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.core.threads import torch_threads
from fedpress.errors import Argument, DivergedError, RunError
from fedpress.federation.exchange import Answer, RequestId, Traffic, failure
from fedpress.federation.local import Outcome
from fedpress.federation.stacked import CannotStackError, Training, train_together
from fedpress.transport.actor import Side
from fedpress.transport.packed import CountedMessage, CountedMessages, deliver_answer
from fedpress.wire.message import MAX_BYTES, Message

log = logger(__name__)

MOST = 128
"""Largest number of clients in a stack, unless it is set."""
NO_MEMORY = "they do not fit into the memory of the device together"
MOST_VALUES = 1 << 26
"""Largest number of parameters of all clients in a stack. Its training needs about six times their
memory: parameters before and after, gradients, momentum, updates."""
TRIES = 3
"""How often each way of training is timed. The first time is not counted: libraries are loaded, and
kernels are chosen in it."""


@dataclass(eq=False)
class Stack:
    """Clients that were trained together.

    Attributes:
        examples: number of their examples.
        unanswered: number of those that have not made their answers yet.
        seconds: how long their training and their answers have taken so far.
    """

    examples: int
    unanswered: int
    seconds: float


@dataclass(eq=False)
class Request:
    """A request to a client that is not answered yet.

    Attributes:
        client: name of the client.
        counted: the message.
        outcome: result of the training that it asks for; None: the client has not been trained.
        stack: the clients that were trained with it, and itself.
    """

    client: ClientId
    counted: CountedMessage
    outcome: Outcome | DivergedError | None = None
    stack: Stack | None = None


@dataclass(eq=False)
class Trial:
    """Times clients in stacks and alone, to find the faster way.

    Attributes:
        seconds: whether in a stack -> seconds per example of each training so far.
    """

    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    @property
    def stacks(self) -> bool:
        """Whether the next clients are trained in a stack."""
        for stacked in (False, True):
            if len(self.seconds[stacked]) < TRIES:
                return stacked
        return min(self.seconds[True][1:]) < min(self.seconds[False][1:])

    def note(self, *, stacked: bool, seconds: float, examples: int) -> None:
        """Notes how long a training took, with what follows until the answer."""
        if len(self.seconds[stacked]) < TRIES:
            self.seconds[stacked].append(seconds / examples)

    def note_answer(self, stack: Stack | None, seconds: float, examples: int) -> None:
        """Notes how long a client took for its answer.

        Args:
            stack: the clients with which it was trained before; None: it was trained alone in this
                time.
            seconds: the time.
            examples: number of the client's examples.
        """
        if stack is None:
            self.note(stacked=False, seconds=seconds, examples=examples)
            return
        stack.seconds += seconds
        stack.unanswered -= 1
        if not stack.unanswered:
            self.note(stacked=True, seconds=stack.seconds, examples=stack.examples)


class StackedTransport:
    """Carries messages to clients in this process, and trains several of them at once.

    The clients that were sent a request are trained together, when the server asks for the first
    answer. Then each client makes its own answer: it clips, codes and masks by itself. Bytes are
    counted as by the local transport. A request that is cancelled later has cost its work.

    Attributes:
        stacked: number of trainings that were taken in stacks.
    """

    def __init__(
        self,
        sides: Mapping[ClientId, Side],
        at_once: int | None = None,
        *,
        trial: Trial | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Makes a transport.

        Args:
            sides: name of each client -> the object that answers for it.
            at_once: largest number of clients in a stack; None: what fits into the memory of most
                devices.
            trial: finds the faster way, and clients that cannot be stacked are then trained alone;
                None: all are stacked.
            max_bytes: largest accepted answer, in bytes.
        """
        self.stacked = 0
        self._sides = dict(sides)
        self._at_once = at_once
        self._trial = trial
        self._can_stack = True
        self._limit = MOST
        self._tried = 0
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._counted = CountedMessages()
        self._sent = 0
        self._open: dict[RequestId, Request] = {}

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._sides)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Keeps `message` until `receive` or `cancel` is called for the request."""
        counted = self._counted.of(message)
        self._traffic += Traffic(down=counted.size)
        self._sent += 1
        self._open[self._sent] = Request(client, counted)
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Returns the answer to the oldest open request in `requests`.

        Args:
            requests: the requests to wait for. If the oldest asks for a training, it is taken
                together with those that were sent after it.
            timeout: ignored, because answers come at once.

        Returns:
            The answer, of kind "error" if the client failed; None if none of `requests` is open.

        Raises:
            RunError: if the clients cannot be trained in one program.
        """
        first = next((number for number in self._open if number in requests), None)
        if first is None:
            return None
        request = self._open[first]
        # One thread, as in every engine: it decides in which order floats are added.
        with torch_threads(1):
            if request.counted.message.kind == "fit" and request.outcome is None:
                # Also those that the server does not wait for yet: it asks for one after another.
                numbers = [first, *(number for number in self._open if number > first)]
                self._try_train([self._open[number] for number in numbers])
            del self._open[first]
            answer, size = deliver_answer(self._answered(request), self._max_bytes)
        self._traffic += Traffic(up=size)
        return request.client, first, answer

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`."""
        for request in requests:
            self._open.pop(request, None)

    def _answered(self, request: Request) -> Message:
        """Returns the answer of the client, which trains now unless it has been trained."""
        side = self._sides[request.client]
        began = time.monotonic()
        try:
            message = request.counted.delivered()
            if request.outcome is None:
                answer = side.answer(message)
            else:
                answer = side.answer_trained(message, request.outcome)
        # As over a network, a client that fails must not end the run.
        except Exception as problem:
            answer = failure(problem)
        if self._trial is not None and request.counted.message.kind == "fit":
            seconds = time.monotonic() - began
            self._trial.note_answer(request.stack, seconds, max(1, side.num_examples))
        return answer

    def _try_train(self, requests: Sequence[Request]) -> None:
        """Trains the first of `requests` together with those that fit to it, unless alone is better.

        Raises:
            RunError: if they cannot be trained in one program, and there is no other way.
        """
        while self._can_stack and (self._trial is None or self._trial.stacks):
            problem = self._problem(requests)
            # A smaller stack may fit into memory.
            if problem == NO_MEMORY and self._at_once is None and self._tried > 1:
                self._limit = self._tried // 2
                log.info("at most %d clients fit into memory together", self._limit)
                continue
            if problem and self._trial is None:
                raise _refusal(problem)
            if problem:
                log.info("clients are trained one after another: %s", problem)
                self._can_stack = False
            return

    def _problem(self, requests: Sequence[Request]) -> str:
        """Trains clients as one stack; returns why that is not possible, or ""."""
        # Returned and not raised: an error would keep the tensors of the stack alive.
        try:
            self._train(requests)
        except CannotStackError as reason:
            return str(reason)
        except torch.OutOfMemoryError:
            return NO_MEMORY
        return ""

    def _train(self, requests: Sequence[Request]) -> None:
        """Trains clients as one stack, and notes their outcomes.

        Raises:
            CannotStackError: if the first of them cannot be trained in a stack.
            torch.OutOfMemoryError: if the stack does not fit into the device's memory.
        """
        began = time.monotonic()
        chosen: list[tuple[Request, Training]] = []
        for request in requests:
            training = self._training(request)
            if training is None or (chosen and not _fit_together(chosen[0][1], training)):
                continue
            chosen.append((request, training))
            if len(chosen) == self._most(training):
                break
        # A client that refuses its request, or is alone in a trial, answers as in other engines.
        if not chosen or (len(chosen) == 1 and self._trial is not None):
            return
        self._tried = len(chosen)
        outcomes = train_together([training for _, training in chosen])
        examples = sum(len(training.work.arrays) for _, training in chosen)
        stack = Stack(examples, len(chosen), time.monotonic() - began)
        for (request, _), outcome in zip(chosen, outcomes, strict=True):
            request.outcome = outcome
            request.stack = stack
        self.stacked += len(chosen)

    def _training(self, request: Request) -> Training | None:
        """Returns the training that an open request asks for; None: it asks for something else.

        Raises:
            CannotStackError: if its steps are not those of a stack.
        """
        if request.counted.message.kind != "fit" or request.outcome is not None:
            return None
        try:
            training = self._sides[request.client].training(request.counted.delivered())
        # `answer` raises the same error, which becomes the client's answer.
        except Exception:
            return None
        training.check()
        return training

    def _most(self, training: Training) -> int:
        """Returns the largest number of clients in a stack."""
        if self._at_once is not None:
            return self._at_once
        assert training.work.start is not None
        fitting = max(2, MOST_VALUES // max(1, training.work.start.numel()))
        return min(self._limit, fitting)


def _refusal(problem: str) -> RunError:
    """Returns the error for clients that must be trained in one program, and cannot."""
    error = RunError(
        f"these clients cannot be trained in one program: {problem}",
        place="engine",
        cure=("give ", Argument("engine", "local"), ", which trains one after another"),
    )
    if problem == NO_MEMORY:
        error.add_cure(", or a smaller ", Argument("engine.at_once"))
    return error


def _fit_together(one: Training, other: Training) -> bool:
    """Returns whether two clients can be in one stack: one network, and one learning rate."""
    return one.model is other.model and one.work.key.round == other.work.key.round
