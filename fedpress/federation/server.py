"""The loop of federated learning as a generator: ask, gather, sum, step, yield. No evaluation, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter

import torch
from torch import Tensor

from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.aggregators.base import Session
from fedpress.federation.agreement import Terms
from fedpress.federation.algorithms import Algorithm, RoundInfo
from fedpress.federation.algorithms.base import ServerState
from fedpress.federation.counted import Counted
from fedpress.federation.delays import Delays
from fedpress.federation.downlink import Broadcast
from fedpress.federation.exchange import Traffic, Transport, error
from fedpress.federation.failures import Tally
from fedpress.federation.outbox import Outbox
from fedpress.federation.protocol import need
from fedpress.federation.schedules import (
    Assignment,
    Schedule,
    ScheduleContext,
    Scheduler,
    Synchronous,
    Timing,
)
from fedpress.federation.schedules.check import Needs, check_schedule
from fedpress.federation.uplink import RoundMean
from fedpress.federation.vectors import PARAMS
from fedpress.wire.message import Message


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """The end of one round, with all that is needed to go on from there (see `Start`).

    Attributes:
        round: how many rounds are done, from 1.
        params: the new parameters [d] float32.
        server_state: of optimizer, noise and downlink by name.
        bytes_up: size of all messages from the clients in this round.
        bytes_down: size of all messages to them.
        clients: a row for each update in the mean, in client order: client, examples, loss,
            update_norm, steps, as far as privacy allows; empty under unit "client".
        refused: clients that were drawn but do not count, with the reason.
        seconds: wall time.
        failures: protected units that gave nothing, counted with noise; None without privacy.
        timing: whose answers were how stale, and the time of the virtual clock.
        set_up: bytes of the messages before the first round, which are part of none: the keys of a
            secure sum. In the record of the first round alone.
    """

    round: int
    params: Tensor
    server_state: ServerState
    bytes_up: int
    bytes_down: int
    clients: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    seconds: float
    failures: Tally | None = None
    timing: Timing = field(default_factory=Timing)
    set_up: Traffic = field(default_factory=Traffic)


PARTS = ("optimizer", "uplink", "downlink", "clients", "schedule", "outbox")
"""What the state of a server is made of."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where rounds begin, or go on from.

    Attributes:
        params: the server's trainable parameters [d] float32, see `fedpress.core.parameters`.
        round: how many rounds are done.
        state: the server's after them, see `RoundRecord.server_state`; None before the first round.
    """

    params: Tensor
    round: int = 0
    state: ServerState | None = None


def rounds(
    terms: Terms,
    transport: Transport,
    start: Start,
    *,
    secret: int | None = None,
    delays: Delays | None = None,
) -> Iterator[RoundRecord]:
    """Runs the rounds after `start`, each when the caller asks for it.

    All randomness is derived from the seed of `terms` and the number of the round, so a run that
    goes on from a record gives the same bits as one that never stopped.

    Args:
        terms: what the clients hold alike, and compare in every request. Without `num_rounds` in it
            there is no end.
        transport: reaches the clients.
        start: the parameters to begin with, or where to go on.
        secret: 256 random bits on which the server's noise hangs instead of the seed.
        delays: how long clients take, on a virtual clock; without them answers come at once.

    Raises:
        RecipeError: if params, clients or schedule do not fit the uplink; at once, not in the first
            round.
    """
    uplink, params = terms.uplink, start.params
    if params.dtype != torch.float32 or params.shape != (uplink.size,):
        raise RecipeError(
            (f"got {params.dtype} {list(params.shape)}, expected torch.float32 [{uplink.size}]"),
            place="params",
        )
    if len(transport.clients()) != uplink.cohort.population:
        raise RecipeError(
            (
                f"planned for {uplink.cohort.population} clients, there are "
                f"{len(transport.clients())}"
            ),
            place="transport",
            cure="plan with as many clients as there are",
        )
    schedule = terms.schedule or Synchronous()
    schedule.check(uplink.cohort)
    check_schedule(schedule, Needs.of(uplink, terms.downlink, terms.algorithm))
    return _Server(terms, schedule, transport, secret, delays).rounds(start)


@dataclass(frozen=True, eq=False)
class _Server:
    """What stays the same from step to step."""

    terms: Terms
    schedule: Schedule
    transport: Transport
    secret: int | None
    delays: Delays | None

    def rounds(self, start: Start) -> Iterator[RoundRecord]:
        """Yields a record for each round after `start`, with the bytes and seconds that it took."""
        last = self.terms.num_rounds
        if last is not None and start.round >= last:
            return
        began, before = perf_counter(), self.transport.traffic
        run = _Run.begin(self, start)
        set_up = self.transport.traffic - before
        if start.round:
            # A run that goes on sets up again, and sends again what clients were at work on: that
            # was counted before.
            began, set_up = perf_counter(), Traffic()
        before = self.transport.traffic
        numbers = count(start.round + 1) if last is None else range(start.round + 1, last + 1)
        try:
            for number in numbers:
                record = run.step(number)
                traffic, seconds = self.transport.traffic - before, perf_counter() - began
                yield replace(
                    record,
                    bytes_up=traffic.up,
                    bytes_down=traffic.down,
                    seconds=seconds,
                    set_up=set_up,
                )
                began, before, set_up = perf_counter(), self.transport.traffic, Traffic()
        finally:
            run.outbox.cancel_all_but([])


@dataclass(eq=False)
class _Run:
    """A run between two server steps; `latest` is the message that brings the newest model."""

    server: _Server
    clients: Sequence[ClientId]
    params: Tensor
    parts: dict[str, ServerState]
    session: Session
    scheduler: Scheduler
    outbox: Outbox
    latest: Message | None = None

    @classmethod
    def begin(cls, server: _Server, start: Start) -> _Run:
        """Begins, or goes on from a state: then those who were at work are sent the same tasks again."""
        terms, transport = server.terms, server.transport
        parts = _begun(terms, start.params) if start.state is None else _split(start.state)
        session = terms.uplink.aggregator.open(transport, terms.agreement.fingerprint)
        context = ScheduleContext(
            transport.clients(),
            terms.uplink.cohort,
            terms.seed,
            server.secret or terms.seed,
            server.delays,
        )
        scheduler = server.schedule.open(context, parts["schedule"])
        outbox = Outbox(transport)
        outbox.load_(scheduler.at_work, parts["outbox"])
        return cls(server, context.clients, start.params, parts, session, scheduler, outbox)

    def step(self, number: int) -> RoundRecord:
        """Gathers the updates of server step `number`, and takes it."""
        server, terms = self.server, self.server.terms
        self.scheduler.begin(number)
        asked = self.scheduler.ask()
        broadcast = None
        if terms.downlink is not None:
            broadcast = Broadcast.open(
                terms.downlink, terms.seed, self.clients, self.parts["downlink"]
            )
        gatherer = terms.uplink.gather(
            seed=terms.seed,
            round=number,
            session=self.session,
            cohort=[one.client for one in asked],
            state=self.parts["uplink"],
            secret=server.secret,
        )
        if asked:
            self._send(asked, number, broadcast)
        while waiting := self.scheduler.wait():
            task, reply = self.outbox.receive(waiting, self.scheduler.patience)
            weight = server.schedule.weight(number - task.task)
            gatherer.take(task.client, reply, task=task.task, scale=weight)
            self.scheduler.take(task)
            if more := self.scheduler.ask():
                self._send(more, number, broadcast)
        timing, late = self.scheduler.end()
        for client, reason in late.items():
            gatherer.take(client, error(reason), task=number)
        stopped = self.outbox.cancel_all_but(self.scheduler.at_work)
        mean = gatherer.close()
        self.parts["uplink"] = mean.state
        if broadcast is not None:
            broadcast.mark_arrived({**dict.fromkeys(stopped, "told to stop"), **mean.refused})
            self.parts["downlink"] = broadcast.state()
        if terms.algorithm.keeps_state:
            counted = Counted.open(self.clients, self.parts["clients"])
            for client in timing.answered:
                counted.note_answer(client, number, refused=mean.refused.get(client, ""))
            self.parts["clients"] = counted.state()
        self._take_step(mean, number)
        self.parts["schedule"] = self.scheduler.state()
        self.parts["outbox"] = self.outbox.state(self.scheduler.at_work)
        return RoundRecord(
            round=number,
            params=self.params,
            server_state=_join(self.parts),
            bytes_up=0,
            bytes_down=0,
            clients=mean.rows,
            refused=mean.refused,
            seconds=0.0,
            failures=mean.failures,
            timing=timing,
        )

    def _take_step(self, mean: RoundMean, number: int) -> None:
        if not mean.vectors:
            return
        algorithm, uplink = self.server.terms.algorithm, self.server.terms.uplink
        seen = RoundInfo(number, mean.cohort, uplink.cohort.population)
        self.parts["optimizer"], self.params = algorithm.server_step(
            self.parts["optimizer"], self.params, mean.vectors, seen
        )
        _check_finite(self.params, number, algorithm)

    def _send(self, asked: list[Assignment], number: int, broadcast: Broadcast | None) -> None:
        """Sends the model to those who are `asked`; messages that are alike share one object, which is packed once."""
        terms, names = self.server.terms, [one.client for one in asked]
        header: dict[str, JSON] = {
            "round": number,
            "agreement": terms.agreement.fingerprint,
            **self.session.invite(names),
        }
        if terms.uplink.adaptive is not None:
            header["clip_norm"] = terms.uplink.update_scale(self.parts["uplink"])
        if self.latest is None or self.latest.header != header:
            beside = terms.algorithm.server_down(self.parts["optimizer"])
            self.latest = Message("fit", header, {PARAMS: self.params, **beside})
        requests = _requests(names, self.latest, broadcast)
        if terms.algorithm.keeps_state:
            counted = Counted.open(self.clients, self.parts["clients"])
            requests = _with_counted(requests, counted)
        for one in asked:
            self.outbox.send(one, requests[one.client])


def _check_finite(params: Tensor, round: int, algorithm: Algorithm) -> None:
    if not bool(torch.isfinite(params).all()):
        raise DivergedError(
            f"the server's model is not finite after round {round}",
            place="server",
            cure=(
                "lower lr, or the lr of the server's optimizer "
                f"({algorithm.optimizer!r}); the rounds before it are kept"
            ),
        )


def _requests(
    cohort: list[ClientId], whole: Message, broadcast: Broadcast | None
) -> dict[ClientId, Message]:
    """Returns a message for each client; those that are sent the same share one object, which is packed once.

    `whole` holds the parameters, which a downlink codes, and further vectors, which travel whole.
    """
    if broadcast is None:
        return dict.fromkeys(cohort, whole)
    header, round = whole.header, need("fit", whole.header, "round")
    beside = {name: vector for name, vector in whole.tensors.items() if name != PARAMS}
    made: dict[int, Message] = {}
    requests = {}
    for client, (version, tensors) in broadcast.encode_for(
        round, whole.tensors[PARAMS], cohort
    ).items():
        if id(tensors) not in made:
            made[id(tensors)] = Message("fit", {**header, "from": version}, {**tensors, **beside})
        requests[client] = made[id(tensors)]
    return requests


def _with_counted(
    requests: Mapping[ClientId, Message], counted: Counted
) -> dict[ClientId, Message]:
    """Tells every client which of its answers counted last; messages that stay alike still share one object."""
    made: dict[tuple[int, int], Message] = {}
    told = {}
    for client, message in requests.items():
        last = counted.last[client]
        if (id(message), last) not in made:
            header = {**message.header, "counted": last}
            made[id(message), last] = Message("fit", header, message.tensors)
        told[client] = made[id(message), last]
    return told


def _begun(terms: Terms, params: Tensor) -> dict[str, ServerState]:
    """Returns the parts of the server's state before the first round."""
    optimizer = terms.algorithm.server_init(params)
    return _split({}) | {"optimizer": optimizer, "uplink": terms.uplink.init()}


def _join(parts: Mapping[str, Mapping[str, Tensor]]) -> ServerState:
    """Returns one table of tensors, `<part>/<name>`."""
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _split(state: Mapping[str, Tensor]) -> dict[str, ServerState]:
    """Undoes `_join`."""
    parts: dict[str, ServerState] = {part: {} for part in PARTS}
    for full, tensor in state.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    return parts
