"""The code that runs in a worker process: it answers one request to a client after another."""

from __future__ import annotations

import ctypes
import logging
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from fedpress.core.canonical import JSON
from fedpress.core.compiler import postpone_compiler
from fedpress.core.names import ClientId
from fedpress.federation import InMemoryState
from fedpress.federation.aggregators.base import Total
from fedpress.federation.exchange import failure
from fedpress.federation.gatherer import Part, part_of
from fedpress.federation.uplink import Uplink
from fedpress.transport.actor import Side, Write
from fedpress.transport.packed import deliver_answer
from fedpress.transport.processes.pending import PendingState, SwitchedState
from fedpress.transport.processes.slots import Piece, Slots
from fedpress.wire.message import Message

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of settings of glibc's `mallopt`: how much freed memory is kept, and from which size on a
tensor gets memory of its own (32 MiB is the largest value)."""


@dataclass(frozen=True)
class Call:
    """A request to one client.

    Attributes:
        client: name of the client.
        kind: kind of the message.
        header: header of the message.
        pieces: tensors of the message.
        slot: slot of these tensors; None if they are in the pieces.
        stored: what the client has stored; None: it is on the disk, where the worker reads it.
    """

    client: ClientId
    kind: str
    header: Mapping[str, JSON]
    pieces: tuple[Piece, ...]
    slot: int | None
    stored: InMemoryState | None


@dataclass(frozen=True)
class Job:
    """Requests on their way to a worker.

    Attributes:
        calls: the requests; one, unless the answers are added up.
        round: number of the round if the answers are added up; else None.
        answer_in: slot for the tensors of the answer; None if none is free.
    """

    calls: tuple[Call, ...]
    round: int | None
    answer_in: int | None


@dataclass(frozen=True)
class Done:
    """A worker's result for one job.

    Attributes:
        answer: the answer; or the sum of answers. Its tensors are left out.
        size: bytes of the answers, as if they were sent over a network.
        pieces: tensors of `answer`.
        writes: client and what it wants to store, without tensors.
        stored: tensors of each write.
        log: what the clients' code has logged.
    """

    answer: Message | Part
    size: int
    pieces: tuple[Piece, ...]
    writes: tuple[tuple[ClientId, Write], ...]
    stored: tuple[tuple[Piece, ...], ...]
    log: tuple[Logged, ...]


@dataclass(frozen=True)
class Logged:
    """A line of the log: name of the logger, level, text."""

    logger: str
    level: int
    text: str


class Collected(logging.Handler):
    """Keeps the lines of the log until `taken` is called."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[Logged] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps one line."""
        self._lines.append(Logged(record.name, record.levelno, record.getMessage()))

    def taken(self) -> tuple[Logged, ...]:
        """Returns the lines since the last call."""
        lines = tuple(self._lines)
        self._lines.clear()
        return lines


@dataclass(frozen=True, eq=False)
class Inherited:
    """What a worker has from the server's process.

    Attributes:
        sides: name of each client -> the object that answers for it.
        memories: name of each client -> its storage.
        uplink: how answers are added up; None if they never are.
        seed: seed of the run.
        max_bytes: largest accepted answer, in bytes.
        requests: slots for tensors of requests.
        answers: slots for tensors of answers.
    """

    sides: Mapping[ClientId, Side]
    memories: Mapping[ClientId, SwitchedState]
    uplink: Uplink | None
    seed: int
    max_bytes: int
    requests: Slots
    answers: Slots

    def done(self, job: Job, log: Collected) -> Done:
        """Answers the requests of a job."""
        writes: list[tuple[ClientId, Write]] = []
        sizes: list[int] = []

        # Clients that get the same message share its tensors: what is computed of them, such as a
        # fingerprint, may then be remembered.
        read: dict[int, dict[str, Tensor]] = {}

        def answers() -> Iterator[tuple[ClientId, Message]]:
            for call in job.calls:
                if id(call.pieces) not in read:
                    (read[id(call.pieces)],) = self.requests.read(call.slot, call.pieces)
                tensors = read[id(call.pieces)]
                answer, size, wanted = self.answered(call, tensors, direct=job.round is not None)
                sizes.append(size)
                writes.extend((call.client, write) for write in wanted)
                yield call.client, answer

        answer: Message | Part
        if job.round is None:
            ((_, answer),) = answers()
            tensors = answer.tensors
            bare: Message | Part = replace(answer, header=dict(answer.header), tensors={})
        else:
            assert self.uplink is not None
            answer = part_of(self.uplink, answers(), seed=self.seed, round=job.round)
            tensors = answer.total.vectors
            bare = replace(answer, total=Total({}, answer.total.weight))
        stored = [write.tensors for _, write in writes]
        first, *further = self.answers.write(job.answer_in, tensors, *stored)
        noted = tuple((client, replace(write, tensors={})) for client, write in writes)
        return Done(bare, sum(sizes), first, noted, tuple(further), log.taken())

    def answered(
        self, call: Call, given: dict[str, Tensor], *, direct: bool
    ) -> tuple[Message, int, list[Write]]:
        """Answers one request.

        Args:
            call: the request.
            given: its tensors.
            direct: whether the client may write to the disk at once, since its answer is used in
                any case.

        Returns:
            The answer, its size in bytes, and what the client wants to store.
        """
        memory = self.memories[call.client]
        side = self.sides[call.client]
        inherited = memory.target
        pending = PendingState(inherited if call.stored is None else call.stored)
        if call.stored is not None or not direct:
            memory.target = pending
        try:
            side.recall()
            answer = side.answer(Message(call.kind, call.header, given, by_hand=True))
        # Sent as an answer: a client that fails must not end the run.
        except Exception as problem:
            answer = failure(problem)
        finally:
            memory.target = inherited
        return *deliver_answer(answer, self.max_bytes), pending.writes


def work(pipe: Connection, life: tuple[int, int], inherited: Inherited) -> None:
    """Answers requests until the server's process has ended, or closes the pipe.

    Args:
        pipe: brings pickled jobs, and takes their results.
        life: both ends of a pipe that is closed when the server's process ends, even by a kill.
        inherited: what the worker has from the server's process.
    """
    # A Ctrl-C reaches all processes of a terminal. The server ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # More threads would wait forever for the threads of the server's process, which a fork does
    # not copy.
    torch.set_num_threads(1)
    _keep_freed_memory()
    # Else each worker, also one that takes the place of another, would import torch's compiler for
    # its first client, which takes much longer than starting all workers.
    postpone_compiler()
    os.close(life[1])
    threading.Thread(target=_end_with_server, args=(life[0],), daemon=True).start()
    # The server's handlers may write to a terminal whose lock another thread held at the fork.
    log = Collected()
    logging.getLogger("fedpress").handlers = [log]
    logging.getLogger("fedpress").propagate = False
    while True:
        try:
            job: Job = pickle.loads(pipe.recv_bytes())
            done = pickle.dumps(inherited.done(job, log))
            _flush_printed()
            pipe.send_bytes(done)
        # The server's process has closed the pipe.
        except (EOFError, OSError):
            return


def _keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next tensors, up to what was used at most.

    By default it gives large tensors back to the system. Then each new one costs a page fault for
    every 4 KiB: several milliseconds for the vectors of a client with a million parameters.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Other C libraries than glibc have no such settings.
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)


def _flush_printed() -> None:
    """Writes out what the clients' code has printed: workers end by a kill, which would lose it."""
    for stream in (sys.stdout, sys.stderr):
        # None in a program without a terminal; closed, or on a full disk, it must end no worker.
        with suppress(Exception):
            stream.flush()


def _end_with_server(life: int) -> None:
    """Ends this process as soon as the server's process has ended."""
    # Nothing is ever written into this pipe, so `read` returns when the other end is closed.
    os.read(life, 1)
    os._exit(0)
