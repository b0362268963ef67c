"""A pool of worker processes: starts them, gives them requests, and notices if one dies."""

from __future__ import annotations

import math
import os
import pickle
import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import cast

from fedpress.core.log import logger
from fedpress.core.names import ClientId
from fedpress.errors import Argument, RunError
from fedpress.federation import DiskState
from fedpress.federation.exchange import RequestId
from fedpress.federation.gatherer import Part
from fedpress.federation.uplink import Uplink
from fedpress.transport.actor import Side, Write
from fedpress.transport.packed import CountedMessage
from fedpress.transport.processes.pending import SwitchedState
from fedpress.transport.processes.slots import Piece, Slots
from fedpress.transport.processes.worker import Call, Done, Inherited, Job, work
from fedpress.wire.message import Message

log = logger(__name__)

REQUEST_SLOTS = 4
"""Number of different messages to clients that shared memory holds at a time."""
ANSWERS_PER_WORKER = 3
"""Slots for answers: one is written, one waits to be taken, one is added to the mean."""
ANSWER_FACTOR = 4
"""A slot for answers is so many times as large as a request: an update, and what a client stores."""
SHORT = 1 << 14
"""Longest job in bytes that fits into a pipe from which nobody reads."""
ROOM = 1 << 20
"""Bytes that each slot has for small tensors."""
CHECK = 10.0
"""Seconds without a result after which the workers are looked at, and again after as many."""
IDLE = 60.0
"""Seconds for which a worker with a request uses no processor time before that is told."""


@dataclass(eq=False)
class Request:
    """Requests to one or more clients, which one worker is to answer.

    Attributes:
        number: id of the request.
        calls: the clients, each with its message.
        round: number of the round if the answers are added up; else None, with one call.
        answer_in: slot for the answer; None: it comes through the pipe.
        deaths: number of workers that have died while they answered it.
    """

    number: RequestId
    calls: tuple[tuple[ClientId, CountedMessage], ...]
    round: int | None = None
    answer_in: int | None = None
    deaths: int = 0


@dataclass(frozen=True, eq=False)
class Result:
    """The result of one request.

    Attributes:
        answer: the client's answer, or the sum of the clients' answers. Its tensors may lie in a
            slot, which is free again as soon as nothing uses them.
        size: bytes of the answers, as if they were sent over a network.
        writes: client and what it wants to store; its tensors lie in the same slot.
    """

    answer: Message | Part
    size: int
    writes: tuple[tuple[ClientId, Write], ...] = ()


@dataclass(eq=False)
class Worker:
    """A worker process.

    Attributes:
        process: the process.
        pipe: takes jobs, and brings results.
        working: the requests that it has, in the order in which it answers them.
        ticks: processor time that it had used when it was last looked at, in ticks of the system.
        since: time of `time.monotonic` at which that number was seen first.
        told: whether it was told that this number does not grow.
    """

    process: ForkProcess
    pipe: Connection
    working: deque[Request] = field(default_factory=deque)
    ticks: int = -1
    since: float = 0.0
    told: bool = False


@dataclass(frozen=True, eq=False)
class Placed:
    """The tensors of a message, in shared memory if `slot` is not None."""

    slot: int | None
    pieces: tuple[Piece, ...]


class Pool:
    """Worker processes, which are forks of this process.

    Attributes:
        workers: the running workers.
    """

    def __init__(
        self,
        sides: Mapping[ClientId, Side],
        memories: Mapping[ClientId, SwitchedState],
        number: int,
        max_bytes: int,
    ) -> None:
        """Starts nothing yet.

        Args:
            sides: name of each client -> the object that answers for it.
            memories: name of each client -> its storage.
            number: number of workers.
            max_bytes: largest accepted answer, in bytes.
        """
        self.number = number
        self.workers: list[Worker] = []
        self._life: tuple[int, int] | None = None
        self._inherited = Inherited(sides, memories, None, 0, max_bytes, Slots(0, 1), Slots(0, 1))
        self._placed: weakref.WeakKeyDictionary[Message, Placed] = weakref.WeakKeyDictionary()

    @property
    def sums(self) -> tuple[Uplink | None, int]:
        """How workers add up answers, and the seed of the run."""
        return self._inherited.uplink, self._inherited.seed

    def prepare(self, uplink: Uplink, seed: int) -> None:
        """Tells how answers are added up. There must be no workers yet."""
        self._inherited = replace(self._inherited, uplink=uplink, seed=seed)

    def start(self, first: Message) -> None:
        """Forks all workers; they know what the clients have agreed on by now.

        Args:
            first: a request. Shared memory is planned for messages of its size.

        Raises:
            RunError: if the system has too little shared memory, or gives no process.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in first.tensors.values())
        self._inherited = replace(
            self._inherited,
            requests=Slots(REQUEST_SLOTS, size + ROOM),
            answers=Slots(ANSWERS_PER_WORKER * self.number, ANSWER_FACTOR * size + ROOM),
        )
        self._placed.clear()
        self._life = os.pipe()
        for _ in range(self.number):
            self.workers.append(self._forked())
        log.info("clients work in %d processes", self.number)

    def _forked(self) -> Worker:
        assert self._life is not None
        try:
            ours, theirs = connection.Pipe()
            arguments = (theirs, self._life, self._inherited)
            process = get_context("fork").Process(target=work, args=arguments, daemon=True)
            with warnings.catch_warnings():
                # Python warns of forks beside threads. Workers use none of this process's locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        # Too many processes or open files, or too little memory.
        except OSError as problem:
            raise RunError(
                f"the system gives no worker process ({problem})",
                place="engine",
                cure=(
                    "take fewer ",
                    Argument("engine.workers"),
                    ", or ",
                    Argument("engine", "local"),
                ),
            ) from problem
        # Only the worker has this end now, so that its death closes the pipe.
        theirs.close()
        return Worker(process, ours)

    def give(self, worker: Worker, request: Request) -> bool:
        """Gives a request to a worker.

        Returns:
            Whether the worker has it now. A worker that is still busy takes small jobs only.
        """
        calls = tuple(self._call(client, counted.message) for client, counted in request.calls)
        answers = self._inherited.answers
        slot = answers.take()
        job = pickle.dumps(Job(calls, request.round, slot))
        # Neither side reads while it writes. If a busy worker is to write a long result while a
        # long job is written to it, both would wait forever.
        if worker.working and (slot is None or len(job) > SHORT):
            if slot is not None:
                answers.give(slot)
            return False
        request.answer_in = slot
        worker.working.append(request)
        # If it has just died, `wait` finds that out.
        with suppress(OSError):
            worker.pipe.send_bytes(job)
        return True

    def _call(self, client: ClientId, message: Message) -> Call:
        """Returns a request as a worker gets it."""
        placed = self._place(message)
        # A worker reads from the disk by itself.
        memory = self._inherited.memories[client].target
        stored = None if isinstance(memory, DiskState) else memory.copied()
        header = dict(message.header)
        return Call(client, message.kind, header, placed.pieces, placed.slot, stored)

    def _place(self, message: Message) -> Placed:
        """Returns the tensors of a message in shared memory; they are copied there once."""
        placed = self._placed.get(message)
        if placed is None:
            slots = self._inherited.requests
            slot = slots.take()
            (pieces,) = slots.write(slot, message.tensors)
            placed = Placed(slot, pieces)
            if slot is not None:
                weakref.finalize(placed, slots.give, slot).atexit = False
            self._placed[message] = placed
        return placed

    def wait(self, timeout: float | None) -> tuple[list[tuple[Request, Result]], list[Request]]:
        """Waits until a worker has a result, or dies.

        Args:
            timeout: seconds after which it returns nothing; None: no limit.

        Returns:
            The results; and the requests of workers that have died. Such workers are replaced.
        """
        found: list[tuple[Request, Result]] = []
        lost: list[Request] = []
        by_pipe = {worker.pipe: worker for worker in self.workers}
        for pipe in self._ready(timeout):
            worker = by_pipe[pipe]
            try:
                done: Done = pickle.loads(worker.pipe.recv_bytes())
            except (EOFError, OSError):
                lost += self._replace(worker)
                continue
            request = worker.working.popleft()
            found.append((request, self._read(request, done)))
        return found, lost

    def _ready(self, timeout: float | None) -> list[Connection]:
        """Waits, and returns the pipes of workers that have a result, or have ended."""
        pipes = [worker.pipe for worker in self.workers]
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = max(0.0, end - time.monotonic())
            ready = connection.wait(pipes, min(left, CHECK))
            if ready or left <= CHECK:
                return cast("list[Connection]", ready)
            for worker in self.workers:
                _tell_if_idle(worker)

    def _read(self, request: Request, done: Done) -> Result:
        """Returns a result, whose tensors stay where they are."""
        for line in done.log:
            logger(line.logger).log(line.level, "%s", line.text)
        tensors, *stored = self._inherited.answers.read(
            request.answer_in, done.pieces, *done.stored, give=True
        )
        writes = []
        for (client, write), values in zip(done.writes, stored, strict=True):
            writes.append((client, replace(write, tensors=values)))
        answer = done.answer
        if isinstance(answer, Part):
            answer = replace(answer, total=replace(answer.total, vectors=tensors))
        else:
            answer = replace(answer, tensors=tensors)
        return Result(answer, done.size, tuple(writes))

    def _replace(self, dead: Worker) -> list[Request]:
        """Starts a new worker in the place of a dead one, and returns the requests of that one."""
        dead.process.join()
        dead.pipe.close()
        log.warning(
            "a worker process has ended (exit code %s); a new one takes its place",
            dead.process.exitcode,
        )
        self.workers[self.workers.index(dead)] = self._forked()
        # It was busy with the first of its requests.
        for request in list(dead.working)[:1]:
            request.deaths += 1
        return self._taken_from(dead)

    def _taken_from(self, worker: Worker) -> list[Request]:
        """Returns the requests that an ended worker had; their slots are free again."""
        for request in worker.working:
            if request.answer_in is not None:
                self._inherited.answers.give(request.answer_in)
        return list(worker.working)

    def end(self) -> list[Request]:
        """Ends all workers, and returns the requests that they had."""
        left: list[Request] = []
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
            left += self._taken_from(worker)
        self.workers = []
        if self._life is not None:
            os.close(self._life[0])
            os.close(self._life[1])
            self._life = None
        return left


def _tell_if_idle(worker: Worker) -> None:
    """Logs once that a worker with a request has used no processor time for `IDLE` seconds.

    It may be stopped, or wait for something that does not come, such as a thread of the server's
    process: a fork has none of them. It may also rightly wait, so it is not ended here.
    """
    try:
        # After the name in brackets: the state, and as 11th and 12th of what follows it the ticks
        # of the program and of the system for it.
        text = Path(f"/proc/{worker.process.pid}/stat").read_text("ascii", "replace")
        state, *numbers = text.rpartition(")")[2].split()
        ticks = int(numbers[10]) + int(numbers[11])
    except (OSError, ValueError, IndexError):
        return
    now = time.monotonic()
    # In state "R" it computes, or would if a core were free.
    if ticks != worker.ticks or state == "R" or not worker.working:
        worker.ticks, worker.since, worker.told = ticks, now, False
        return
    if worker.told or now - worker.since < IDLE:
        return
    worker.told = True
    pid = worker.process.pid
    stopped = f"it is stopped; `kill -CONT {pid}` lets it go on" if state == "T" else "it waits"
    log.warning(
        "worker process %d has not computed for %.0f s while it worked for %s: %s; "
        "`kill -9 %d` lets another worker take its place, and engine='local' needs none",
        pid,
        now - worker.since,
        ", ".join(client for client, _ in worker.working[0].calls[:3]),
        stopped,
        pid,
    )
