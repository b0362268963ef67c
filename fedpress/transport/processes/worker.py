"""The code that runs in a worker process: it answers one request to a client after another."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.federation import InMemoryState
from fedpress.federation.exchange import failure
from fedpress.transport.actor import Side, Write
from fedpress.transport.packed import deliver_answer
from fedpress.transport.processes.pending import PendingState, SwitchedState
from fedpress.transport.processes.slots import Piece, Slots
from fedpress.wire.message import Message


@dataclass(frozen=True)
class Job:
    """A request to a client, on its way to a worker.

    Attributes:
        client: name of the client.
        kind: kind of the message.
        header: header of the message.
        pieces: tensors of the message.
        slot: slot of these tensors; None if they are in the pieces.
        answer_in: slot for the tensors of the answer; None if none is free.
        stored: what the client has stored; None: it is on the disk, where the worker reads it.
    """

    client: ClientId
    kind: str
    header: Mapping[str, JSON]
    pieces: tuple[Piece, ...]
    slot: int | None
    answer_in: int | None
    stored: InMemoryState | None


@dataclass(frozen=True)
class Done:
    """A worker's result for one request.

    Attributes:
        kind: kind of the answer.
        header: header of the answer.
        size: bytes of the answer, as if it were sent over a network.
        pieces: tensors of the answer.
        writes: what the client stored, without tensors.
        stored: tensors of each write.
        log: what the client's code has logged.
    """

    kind: str
    header: Mapping[str, JSON]
    size: int
    pieces: tuple[Piece, ...]
    writes: tuple[Write, ...] = ()
    stored: tuple[tuple[Piece, ...], ...] = ()
    log: tuple[Logged, ...] = ()


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


def work(
    pipe: Connection,
    life: tuple[int, int],
    sides: Mapping[ClientId, Side],
    memories: Mapping[ClientId, SwitchedState],
    requests: Slots,
    answers: Slots,
    max_bytes: int,
) -> None:
    """Answers requests until the server's process has ended, or closes the pipe.

    Args:
        pipe: brings pickled jobs, and takes their results.
        life: both ends of a pipe that is closed when the server's process ends, even by a kill.
        sides: name of each client -> the object that answers for it.
        memories: name of each client -> its storage.
        requests: slots for tensors of requests.
        answers: slots for tensors of answers.
        max_bytes: largest accepted answer, in bytes.
    """
    # A Ctrl-C reaches all processes of a terminal. The server ends the workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # More threads would wait forever for the threads of the server's process, which a fork does
    # not copy.
    torch.set_num_threads(1)
    os.close(life[1])
    threading.Thread(target=_end_with_server, args=(life[0],), daemon=True).start()
    # The server's handlers may write to a terminal whose lock another thread held at the fork.
    log = Collected()
    logging.getLogger("fedpress").handlers = [log]
    logging.getLogger("fedpress").propagate = False
    while True:
        try:
            job: Job = pickle.loads(pipe.recv_bytes())
            answer, size, writes = _answered(
                job, sides[job.client], memories[job.client], requests, max_bytes
            )
            stored = [write.tensors for write in writes]
            first, *further = answers.write(job.answer_in, answer.tensors, *stored)
            bare = tuple(replace(write, tensors={}) for write in writes)
            header = dict(answer.header)
            done = Done(answer.kind, header, size, first, bare, tuple(further), log.taken())
            pipe.send_bytes(pickle.dumps(done))
        # The server's process has closed the pipe.
        except (EOFError, OSError):
            return


def _answered(
    job: Job, side: Side, memory: SwitchedState, requests: Slots, max_bytes: int
) -> tuple[Message, int, list[Write]]:
    """Answers one request.

    Returns:
        The answer, its size in bytes, and what the client wants to store.
    """
    inherited = memory.target
    pending = PendingState(inherited if job.stored is None else job.stored)
    memory.target = pending
    try:
        side.recall()
        (tensors,) = requests.read(job.slot, job.pieces)
        answer = side.answer(Message(job.kind, job.header, tensors))
    # Sent as an answer: a client that fails must not end the run.
    except Exception as problem:
        answer = failure(problem)
    finally:
        memory.target = inherited
    return *deliver_answer(answer, max_bytes), pending.writes


def _end_with_server(life: int) -> None:
    """Ends this process as soon as the server's process has ended."""
    # Nothing is ever written into this pipe, so `read` returns when the other end is closed.
    os.read(life, 1)
    os._exit(0)
