"""The server's loop as a generator: send the model, gather updates, take a step, yield a record.

The generator does not evaluate the model and writes no files; the caller's loop does both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter
from typing import cast

import torch
from torch import Tensor

from fedpress.core.canonical import JSON
from fedpress.core.finite import is_finite
from fedpress.core.names import ClientId
from fedpress.core.threads import torch_threads
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.aggregators.base import Session
from fedpress.federation.aggregators.mean import block_size
from fedpress.federation.agreement import Terms
from fedpress.federation.algorithms import Algorithm, RoundInfo
from fedpress.federation.algorithms.base import ServerState
from fedpress.federation.counted import Counted
from fedpress.federation.delays import Delays
from fedpress.federation.downlink import Broadcast
from fedpress.federation.exchange import Traffic, Transport, error
from fedpress.federation.failures import Tally
from fedpress.federation.gatherer import Gatherer, RoundMean, SummingTransport, gather
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
from fedpress.federation.vectors import PARAMS
from fedpress.wire.message import Message


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """The result of one round. A run resumes from `round`, `params` and `server_state` (`Start`).

    Attributes:
        round: number of the round, from 1.
        params: the new parameters [d] float32.
        server_state: state of optimizer, noise, downlink and so on, as tensors named
            `<part>/<name>`. Example: `optimizer/velocity`.
        bytes_up: size of all messages from the clients in this round.
        bytes_down: size of all messages to the clients in this round.
        clients: one row for each update in the mean, in the order in which they were added. A row
            has `client`, `examples`, `loss`, `update_norm` and `steps`, except those that privacy
            forbids. There are no rows in a secure sum, and if privacy forbids to name clients.
        refused: client whose answer is missing or was not used -> the reason.
        seconds: wall time of the round.
        failures: noisy counts of examples (or clients) without a usable gradient; None without
            privacy.
        timing: the staleness of each client's answer, and the time of the virtual clock.
        set_up: bytes of the messages before the first round (the keys of a secure sum). They are
            not part of `bytes_up` and `bytes_down`. They are 0 in all records except the first.
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
"""The parts of the server's state; its tensors are named `<part>/<name>`."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where the rounds start: at the beginning, or after a finished round.

    Attributes:
        params: the server's trainable parameters [d] float32, see `fedpress.core.parameters`.
        round: number of the last finished round; 0 at the beginning.
        state: the server's state after that round (`RoundRecord.server_state`); None at the
            beginning.
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
    """Yields the record of each round after `start`; a round runs when the caller asks for it.

    All randomness is derived from the seed of `terms` (or from `secret`) and the number of the
    round. So a resumed run gives the same bits as an uninterrupted run.

    Args:
        terms: the settings that server and clients share. Every request contains a fingerprint of
            them, which the client checks. If `terms.num_rounds` is None, the rounds never end.
        transport: carries messages to the clients.
        start: the parameters and, for a resumed run, the server's state.
        secret: key of the server's noise and sampling (256 bits). If None, both follow from the
            seed.
        delays: how long clients take, on a virtual clock; None: there is no virtual clock.

    Raises:
        RecipeError: if parameters, number of clients or schedule do not fit the uplink, or if
            downlink or algorithm do not work with the schedule. This call raises the error, before
            the first round runs.
    """
    uplink = terms.uplink
    params = start.params
    if params.dtype != torch.float32 or params.shape != (uplink.size,):
        raise RecipeError(
            f"got {params.dtype} {list(params.shape)}, expected torch.float32 [{uplink.size}]",
            place="params",
        )
    # Noise and sampling probability were calibrated for exactly this many clients: with other
    # numbers the promised epsilon would be wrong.
    clients = len(transport.clients())
    if clients != uplink.cohort.population:
        raise RecipeError(
            f"planned for {uplink.cohort.population} clients, there are {clients}",
            place="transport",
            cure=f"make the terms for {clients} clients",
        )
    schedule = terms.schedule or Synchronous()
    schedule.check(uplink.cohort)
    check_schedule(schedule, Needs.of(uplink, terms.downlink, terms.algorithm))
    # This function is not a generator: a generator would run the checks above only when the first
    # record is asked for.
    return _Server(terms, schedule, transport, secret, delays).rounds(start)


@dataclass(frozen=True, eq=False)
class _Server:
    """The settings and services of a run, which do not change between rounds."""

    terms: Terms
    schedule: Schedule
    transport: Transport
    secret: int | None
    delays: Delays | None

    def rounds(self, start: Start) -> Iterator[RoundRecord]:
        """Yields the record of each round after `start`, with its bytes and seconds."""
        last = self.terms.num_rounds
        if last is not None and start.round >= last:
            return
        began = perf_counter()
        before = self.transport.traffic
        run = _Run.begin(self, start)
        set_up = self.transport.traffic - before
        # A resumed run repeats the exchange of keys and resends open tasks. The interrupted run
        # has already counted these bytes.
        if start.round:
            began = perf_counter()
            set_up = Traffic()
        before = self.transport.traffic
        numbers = count(start.round + 1) if last is None else range(start.round + 1, last + 1)
        try:
            for number in numbers:
                # The number of threads decides the order in which floats are added. So with one
                # thread the bits do not depend on the machine's cores or on where clients work.
                with torch_threads(1):
                    record = run.step(number)
                traffic = self.transport.traffic - before
                yield replace(
                    record,
                    bytes_up=traffic.up,
                    bytes_down=traffic.down,
                    seconds=perf_counter() - began,
                    set_up=set_up,
                )
                # Set after the yield, so that the caller's evaluation between two rounds is not
                # counted in either.
                began = perf_counter()
                before = self.transport.traffic
                set_up = Traffic()
        finally:
            run.outbox.cancel_all_but([])


@dataclass(eq=False)
class _Run:
    """The state of a run, which changes in every round, and the steps of a round.

    Attributes:
        server: settings and services that do not change.
        clients: names of all clients, in the transport's order.
        params: the server's parameters [d].
        parts: the server's state: name from `PARTS` -> tensors by name.
        session: the server's side of the aggregation, such as a secure sum.
        scheduler: decides when which client is asked.
        outbox: tasks that were sent and are not answered yet.
        latest: the message with the newest model; None before the first message is sent.
    """

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
        """Starts a run. A run that is resumed from `start.state` resends its unanswered tasks."""
        terms = server.terms
        transport = server.transport
        if start.state is None:
            parts = _initial_parts(terms, start.params)
        else:
            parts = _split_state(start.state)
        if isinstance(transport, SummingTransport):
            transport.prepare(terms.uplink, terms.seed)
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
        """Gathers the updates of round `number`, and takes a server step."""
        terms = self.server.terms
        self.scheduler.begin(number)
        asked = self.scheduler.ask()
        broadcast = None
        if terms.downlink is not None:
            broadcast = Broadcast.open(
                terms.downlink, terms.seed, self.clients, self.parts["downlink"]
            )
        gatherer = gather(
            terms.uplink,
            seed=terms.seed,
            round=number,
            session=self.session,
            cohort=[one.client for one in asked],
            state=self.parts["uplink"],
            secret=self.server.secret,
        )
        if asked and self._adds_up_there():
            self._take_parts(gatherer, asked, number, broadcast)
        else:
            if asked:
                self._send(asked, number, broadcast)
            self._take_answers(gatherer, number, broadcast)

        timing, late = self.scheduler.end()
        for client, reason in late.items():
            gatherer.take(client, error(reason), task=number)
        # After a deadline, or with over-selection, some tasks are still open, but nobody waits for
        # their answers.
        stopped = self.outbox.cancel_all_but(self.scheduler.at_work)
        mean = gatherer.close()
        self._note_answers(mean, timing, stopped, number, broadcast)
        self._take_step(mean, number)
        # Stored after the step, because a resumed run starts with the next round.
        self.parts["schedule"] = self.scheduler.state()
        self.parts["outbox"] = self.outbox.state(self.scheduler.at_work)
        return RoundRecord(
            round=number,
            params=self.params,
            server_state=_join_state(self.parts),
            # Bytes and seconds are filled in by `_Server.rounds`, which measures the whole round.
            bytes_up=0,
            bytes_down=0,
            clients=mean.rows,
            refused=mean.refused,
            seconds=0.0,
            failures=mean.failures,
            timing=timing,
        )

    def _adds_up_there(self) -> bool:
        """Whether the transport adds up the answers where the clients work."""
        uplink = self.server.terms.uplink
        return (
            isinstance(self.server.transport, SummingTransport)
            and self.server.schedule.waits_for_all
            and uplink.aggregator.part(uplink.vector_codecs) is not None
        )

    def _take_parts(
        self,
        gatherer: Gatherer,
        asked: list[Assignment],
        number: int,
        broadcast: Broadcast | None,
    ) -> None:
        """Sends the model, and adds the sums over blocks of clients to `gatherer`."""
        transport = cast("SummingTransport", self.server.transport)
        requests = list(self._messages(asked, number, broadcast).items())
        for part in transport.parts(requests, number, block_size(len(requests))):
            gatherer.merge(part)
        while waiting := self.scheduler.wait():
            self.scheduler.take(waiting[0])

    def _take_answers(self, gatherer: Gatherer, number: int, broadcast: Broadcast | None) -> None:
        """Passes answers to `gatherer` until the schedule has enough answers for this step.

        If the schedule asks further clients meanwhile, sends them the model.
        """
        while waiting := self.scheduler.wait():
            task, reply = self.outbox.receive(waiting, self.scheduler.patience)
            staleness = number - task.task
            # Buffered schedules give an update from an old model a smaller weight.
            weight = self.server.schedule.weight(staleness)
            gatherer.take(task.client, reply, task=task.task, scale=weight)
            self.scheduler.take(task)
            more = self.scheduler.ask()
            if more:
                self._send(more, number, broadcast)

    def _note_answers(
        self,
        mean: RoundMean,
        timing: Timing,
        stopped: list[ClientId],
        number: int,
        broadcast: Broadcast | None,
    ) -> None:
        """Stores which answers were used, and which version of the model each client has now.

        Args:
            mean: the mean of the round.
            timing: the clients that answered.
            stopped: clients whose tasks were cancelled.
            number: number of the round.
            broadcast: the downlink coder; None if the model is sent uncoded.
        """
        self.parts["uplink"] = mean.state
        if broadcast is not None:
            # A cancelled client may or may not have read the new model. The server assumes that the
            # client still has the old model. If that is wrong, the client answers the next request
            # with an error, and then gets the full model.
            refused = {**dict.fromkeys(stopped, "told to stop"), **mean.refused}
            broadcast.mark_arrived(refused)
            self.parts["downlink"] = broadcast.state()
        if self.server.terms.algorithm.keeps_state:
            counted = Counted.open(self.clients, self.parts["clients"])
            for client in timing.answered:
                counted.note_answer(client, number, refused=mean.refused.get(client, ""))
            self.parts["clients"] = counted.state()

    def _take_step(self, mean: RoundMean, number: int) -> None:
        """Takes the algorithm's server step, if there is at least one usable update."""
        # Without an update the model stays as it is. A step with a zero update would still change
        # it, since the momentum of earlier rounds would move it.
        if not mean.vectors:
            return
        algorithm = self.server.terms.algorithm
        population = self.server.terms.uplink.cohort.population
        info = RoundInfo(number, mean.cohort, population)
        self.parts["optimizer"], self.params = algorithm.server_step(
            self.parts["optimizer"], self.params, mean.vectors, info
        )
        _check_finite(self.params, number, algorithm)

    def _send(self, asked: list[Assignment], number: int, broadcast: Broadcast | None) -> None:
        """Sends the model to the clients in `asked`."""
        requests = self._messages(asked, number, broadcast)
        for one in asked:
            self.outbox.send(one, requests[one.client])

    def _messages(
        self, asked: list[Assignment], number: int, broadcast: Broadcast | None
    ) -> dict[ClientId, Message]:
        """Returns the message with the model for each client in `asked`, in their order.

        Clients that get equal messages share one object, because the transport serializes each
        object once.
        """
        terms = self.server.terms
        names = [one.client for one in asked]
        header: dict[str, JSON] = {
            "round": number,
            "agreement": terms.agreement.fingerprint,
            **self.session.invite(names),
        }
        if terms.uplink.adaptive is not None:
            header["clip_norm"] = terms.uplink.update_scale(self.parts["uplink"])
        # A buffered schedule asks clients at several times with the same model. The message is
        # reused, so that it is serialized once.
        if self.latest is None or self.latest.header != header:
            extras = terms.algorithm.server_down(self.parts["optimizer"])
            self.latest = Message("fit", header, {PARAMS: self.params, **extras})
        # With a coded downlink, clients with different copies of the model get other messages.
        requests = _requests(names, self.latest, broadcast)
        if terms.algorithm.keeps_state:
            counted = Counted.open(self.clients, self.parts["clients"])
            requests = _with_counted(requests, counted)
        return {name: requests[name] for name in names}


def _check_finite(params: Tensor, round: int, algorithm: Algorithm) -> None:
    if not is_finite(params):
        raise DivergedError(
            f"the server's model is not finite after round {round}",
            place="server",
            cure=(
                "lower lr, or the lr of the server's optimizer "
                f"({algorithm.optimizer!r}); the rounds before {round} are saved"
            ),
        )


def _requests(
    cohort: list[ClientId], whole: Message, broadcast: Broadcast | None
) -> dict[ClientId, Message]:
    """Returns a message for each client; clients with the same copy of the model share one object.

    Args:
        cohort: the clients that are asked.
        whole: the message with uncoded parameters and the algorithm's further vectors. A downlink
            encodes only the parameters.
        broadcast: the downlink coder; None if the parameters are sent as float32.
    """
    if broadcast is None:
        return dict.fromkeys(cohort, whole)
    header = whole.header
    round = need("fit", header, "round")
    extras = {name: vector for name, vector in whole.tensors.items() if name != PARAMS}
    coded = broadcast.encode_for(round, whole.tensors[PARAMS], cohort)
    made: dict[int, Message] = {}
    requests = {}
    for client, (version, tensors) in coded.items():
        # `encode_for` returns one dictionary for all clients that hold the same model.
        if id(tensors) not in made:
            packed = broadcast.downlink.packed_floats(tensors, whole=not version)
            told = {**header, "from": version}
            made[id(tensors)] = Message("fit", told, {**tensors, **extras}, packed)
        requests[client] = made[id(tensors)]
    return requests


def _with_counted(
    requests: Mapping[ClientId, Message], counted: Counted
) -> dict[ClientId, Message]:
    """Adds the field `counted` to each request: the round of the client's last used answer.

    Clients with the same request and the same value of this field share one message object.
    """
    made: dict[tuple[int, int], Message] = {}
    result = {}
    for client, message in requests.items():
        last = counted.last[client]
        if (id(message), last) not in made:
            header = {**message.header, "counted": last}
            made[id(message), last] = replace(message, header=header)
        result[client] = made[id(message), last]
    return result


def _initial_parts(terms: Terms, params: Tensor) -> dict[str, ServerState]:
    """Returns the parts of the server's state before the first round."""
    optimizer = terms.algorithm.server_init(params)
    return _split_state({}) | {"optimizer": optimizer, "uplink": terms.uplink.init()}


def _join_state(parts: Mapping[str, Mapping[str, Tensor]]) -> ServerState:
    """Returns all tensors in one dictionary, named `<part>/<name>`."""
    state = {}
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            state[f"{part}/{name}"] = tensor
    return state


def _split_state(state: Mapping[str, Tensor]) -> dict[str, ServerState]:
    """Reverses `_join_state`; a part without tensors is an empty dictionary."""
    parts: dict[str, ServerState] = {part: {} for part in PARTS}
    for full, tensor in state.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    return parts
