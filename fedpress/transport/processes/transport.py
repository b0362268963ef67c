"""The transport to clients in worker processes: deals out requests, and takes the answers."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedpress.core.names import ClientId
from fedpress.core.threads import torch_threads
from fedpress.federation.exchange import Answer, RequestId, Traffic, error, failure
from fedpress.federation.gatherer import Part, part_of
from fedpress.federation.uplink import Uplink
from fedpress.transport.actor import Side
from fedpress.transport.packed import CountedMessages, deliver_answer
from fedpress.transport.processes.pending import SwitchedState
from fedpress.transport.processes.pool import Pool, Request, Result
from fedpress.wire.message import MAX_BYTES, Message

WORK = ("fit", "evaluate")
"""Kinds of requests that workers answer. All others are answered in this process."""
SET_UP = ("agree", "roster")
"""Kinds of requests that change a client beyond what it stores. Workers are made anew after them."""
AHEAD = 4
"""The next request is the longest of so many waiting ones for each worker."""
LIVES = 2
"""Number of workers that may die over one request before its client counts as failed."""


class ProcessTransport:
    """Carries messages to clients that work in several processes at the same time.

    The workers are forked when they are first needed, so they know all that the clients have agreed
    on, and each can answer for every client. What a client stores comes back with its answer, and
    `receive` writes it. So a request that is cancelled leaves no trace, as with the local
    transport. If a worker dies, its requests go to others.

    Answers are returned in the order in which the requests were sent, and each client computes with
    one thread, so results have the same bits as with the local transport.
    """

    def __init__(
        self,
        sides: Mapping[ClientId, Side],
        workers: int,
        *,
        patience: float = 0.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Makes a transport; processes are started later.

        Args:
            sides: name of each client -> the object that answers for it; its `memory` is wrapped, so
                that workers can put another in its place.
            workers: number of worker processes.
            patience: seconds for which clients work in this process before workers are started. A
                short stage then needs none.
            max_bytes: largest accepted answer, in bytes.
        """
        self._sides = dict(sides)
        self._memories: dict[ClientId, SwitchedState] = {}
        for name, side in sides.items():
            self._memories[name] = SwitchedState(side.memory)
            side.memory = self._memories[name]
        self._pool = Pool(self._sides, self._memories, workers, max_bytes)
        self._patience = patience
        self._max_bytes = max_bytes
        self._traffic = Traffic()
        self._counted = CountedMessages()
        self._sent = 0
        self._open: dict[RequestId, Request] = {}
        # Requests for workers that none of them has, in the order in which they were sent.
        self._waiting: list[Request] = []
        self._results: dict[RequestId, Result] = {}
        # Blocks of clients that are asked one by one, because one of them ends its workers.
        self._divided: dict[RequestId, list[Request]] = {}

    @property
    def traffic(self) -> Traffic:
        """Bytes carried since the transport was made."""
        return self._traffic

    def clients(self) -> Sequence[ClientId]:
        """Names of the clients, in the order in which they were given."""
        return list(self._sides)

    @property
    def num_workers(self) -> int:
        """Number of running worker processes."""
        return len(self._pool.workers)

    def send(self, client: ClientId, message: Message) -> RequestId:
        """Gives `message` to a worker, or lets it wait for its turn."""
        counted = self._counted.of(message)
        self._traffic += Traffic(down=counted.size)
        self._sent += 1
        request = Request(self._sent, ((client, counted),))
        self._open[self._sent] = request
        if message.kind in SET_UP:
            self._end_workers()
        if message.kind in WORK:
            self._waiting.append(request)
            self._feed()
        return self._sent

    def receive(
        self, requests: Collection[RequestId], timeout: float | None = None
    ) -> Answer | None:
        """Waits for the answer to the first of `requests`, in the order in which they were sent.

        Args:
            requests: the requests to wait for.
            timeout: seconds after which None is returned; None: no limit.

        Returns:
            The answer; None after `timeout` seconds, or if none of `requests` is open.

        Raises:
            RunError: if the system has too little shared memory.
        """
        first = next((request for request in self._open if request in requests), None)
        if first is None:
            return None
        request = self._open[first]
        if (
            not self._answers_while_patient(request)
            and request.calls[0][1].message.kind not in WORK
        ):
            self._results[first] = self._answered_here(request)
        end = None if timeout is None else time.monotonic() + timeout
        while first not in self._results:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not self._progress(left):
                return None
        answer = self._delivered(request)
        assert isinstance(answer, Message)
        return request.calls[0][0], first, answer

    def prepare(self, uplink: Uplink, seed: int) -> None:
        """See `SummingTransport`."""
        self._end_workers()
        self._pool.prepare(uplink, seed)

    def parts(
        self, requests: Sequence[tuple[ClientId, Message]], round: int, size: int
    ) -> Iterator[Part]:
        """See `SummingTransport`. Each block of clients is answered by one worker.

        Raises:
            RunError: if the system has too little shared memory.
        """
        blocks = []
        for first in range(0, len(requests), size):
            calls = []
            for client, message in requests[first : first + size]:
                counted = self._counted.of(message)
                self._traffic += Traffic(down=counted.size)
                calls.append((client, counted))
            self._sent += 1
            blocks.append(Request(self._sent, tuple(calls), round))
        self._open |= {block.number: block for block in blocks}
        self._waiting += blocks
        self._feed()
        try:
            for block in blocks:
                yield from self._parts_of(block)
        # Also if the caller stops early.
        finally:
            self.cancel([block.number for block in blocks])

    def _parts_of(self, block: Request) -> Iterator[Part]:
        """Yields the sum over a block; or the sums over its parts, if it had to be divided."""
        while block.number not in self._results and block.number not in self._divided:
            if not self._answers_while_patient(block):
                self._progress(None)
        for piece in self._divided.pop(block.number, ()):
            yield from self._parts_of(piece)
        if block.number in self._results:
            part = self._delivered(block)
            assert isinstance(part, Part)
            yield part

    def _answers_while_patient(self, request: Request) -> bool:
        """Answers a waiting request here if it stays here, and returns whether it did."""
        if request not in self._waiting or not self._stays_here(request):
            return False
        self._waiting.remove(request)
        began = time.monotonic()
        self._results[request.number] = self._answered_here(request)
        self._patience -= time.monotonic() - began
        return True

    def _stays_here(self, request: Request) -> bool:
        """Whether this process answers a request; if not, there are workers afterwards."""
        if self._pool.workers:
            return False
        if self._patience > 0:
            return True
        self._pool.start(request.calls[0][1].message)
        self._feed()
        return False

    def _progress(self, timeout: float | None) -> bool:
        """Waits for a worker, and gives out more work; returns whether anything has happened."""
        results, lost = self._pool.wait(timeout)
        for request, result in results:
            # Nobody wants the result of a request that was cancelled.
            if request.number in self._open:
                self._results[request.number] = result
        self._wait_again(lost)
        self._feed()
        return bool(results or lost)

    def cancel(self, requests: Collection[RequestId]) -> None:
        """Forgets `requests`. Those that no worker has yet cost no work."""
        for number in requests:
            request = self._open.pop(number, None)
            self._results.pop(number, None)
            if request in self._waiting:
                self._waiting.remove(request)
            self.cancel([piece.number for piece in self._divided.pop(number, ())])

    def close(self) -> None:
        """Ends the workers."""
        self._pool.end()

    def _feed(self) -> None:
        """Gives waiting requests to workers that have nothing to do."""
        workers = self._pool.workers
        # A second request spares a worker from waiting for this process. At the end of a round it
        # could only keep another worker from taking it.
        most = 2 if len(self._waiting) > 2 * len(workers) else 1
        for depth in range(most):
            for worker in workers:
                if not self._waiting or len(worker.working) > depth:
                    continue
                request = self._longest()
                if self._pool.give(worker, request):
                    self._waiting.remove(request)

    def _longest(self) -> Request:
        """Returns the waiting request with the most examples, among the first ones.

        Only the first ones, because answers are returned in the order of sending: an answer that
        comes much too early would have to be kept.
        """
        first = self._waiting[: AHEAD * len(self._pool.workers)]
        return max(first, key=self._examples_of)

    def _examples_of(self, request: Request) -> int:
        return sum(self._sides[client].num_examples for client, _ in request.calls)

    def _end_workers(self) -> None:
        """Ends the workers; the requests that they had wait again."""
        self._wait_again(self._pool.end())

    def _wait_again(self, lost: Sequence[Request]) -> None:
        """Lets requests wait again whose workers have ended, at the first places."""
        again = []
        for request in lost:
            if request.number not in self._open:
                continue
            if request.deaths < LIVES:
                again.append(request)
            elif len(request.calls) == 1:
                self._results[request.number] = self._failed(request)
            # One of the clients ends the workers: each is asked alone.
            else:
                pieces = []
                for call in request.calls:
                    self._sent += 1
                    pieces.append(Request(self._sent, (call,), request.round))
                self._divided[request.number] = pieces
                self._open |= {piece.number: piece for piece in pieces}
                again += pieces
        self._waiting = again + self._waiting

    def _failed(self, request: Request) -> Result:
        """Returns the result of a request over which workers have died."""
        reason = error(f"{request.deaths} worker processes have ended while it worked")
        answer, size = deliver_answer(reason, self._max_bytes)
        if request.round is None:
            return Result(answer, size)
        return Result(self._part([(request.calls[0][0], answer)], request.round), size)

    def _part(self, answers: Iterable[tuple[ClientId, Message]], round: int) -> Part:
        uplink, seed = self._pool.sums
        assert uplink is not None
        return part_of(uplink, answers, seed=seed, round=round)

    def _answered_here(self, request: Request) -> Result:
        """Answers a request in this process, with one thread as in a worker."""
        sizes: list[int] = []

        def answers() -> Iterator[tuple[ClientId, Message]]:
            for client, counted in request.calls:
                side = self._sides[client]
                try:
                    side.recall()
                    answer = side.answer(counted.delivered())
                # A client that fails must not end the run.
                except Exception as problem:
                    answer = failure(problem)
                answer, size = deliver_answer(answer, self._max_bytes)
                sizes.append(size)
                yield client, answer

        with torch_threads(1):
            if request.round is None:
                ((_, answer),) = answers()
                return Result(answer, sum(sizes))
            part = self._part(answers(), request.round)
            return Result(part, sum(sizes))

    def _delivered(self, request: Request) -> Message | Part:
        """Writes what the clients have stored, and returns the answer."""
        del self._open[request.number]
        result = self._results.pop(request.number)
        answer, size = result.answer, result.size
        # Before the answer is used: after a crash a client must still know what it has answered.
        try:
            for client, write in result.writes:
                # Copied, because storage in memory would keep the slot.
                own = {name: tensor.clone() for name, tensor in write.tensors.items()}
                replace(write, tensors=own).store(self._memories[client])
        # A full disk: the client fails, as it does in the local transport.
        except Exception as problem:
            answer, size = deliver_answer(failure(problem), self._max_bytes)
        self._traffic += Traffic(up=size)
        return answer
