"""The loop of federated learning as a generator: draw a cohort, send, sum, step, yield. No evaluation, no files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from fedpress.core.names import ClientId
from fedpress.errors import DivergedError, RecipeError
from fedpress.federation.algorithms import Algorithm, Seen
from fedpress.federation.algorithms.base import ServerState
from fedpress.federation.counted import Counted
from fedpress.federation.downlink import Broadcast, Downlink
from fedpress.federation.exchange import Transport, exchange, ordered
from fedpress.federation.failures import Tally
from fedpress.federation.uplink import Uplink
from fedpress.federation.vectors import PARAMS, Vectors
from fedpress.wire.message import JSON, Message


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """The end of one round, with all that is needed to go on from there.

    Attributes:
        round: how many rounds are done, from 1; give it as `start` to go on.
        params: the new parameters [d] float32.
        server_state: of optimizer, noise and downlink by name; give it as `server_state` to go on.
        bytes_up: size of all messages from the clients in this round.
        bytes_down: size of all messages to them.
        clients: a row for each update in the mean, in client order: client, examples, loss, update_norm, steps, as far
            as privacy allows; empty under unit "client".
        refused: clients that were drawn but do not count, with the reason.
        seconds: wall time.
        failures: protected units that gave nothing, counted with noise; None without privacy.
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


def rounds(
    params: Tensor,
    uplink: Uplink,
    algorithm: Algorithm,
    transport: Transport,
    *,
    num_rounds: int,
    seed: int,
    start: int = 0,
    server_state: ServerState | None = None,
    agreement: str = "",
    downlink: Downlink | None = None,
    secret: int | None = None,
) -> Iterator[RoundRecord]:
    """Runs rounds `start` + 1 to `num_rounds`, each when the caller asks for it.

    All randomness is derived from `seed` and the number of the round, so a run that goes on from a record gives the
    same bits as one that never stopped.

    Args:
        params: the server's trainable parameters [d] float32, see `fedpress.core.parameters`.
        uplink: how updates come home.
        algorithm: its server's half is used here, the other one by the clients.
        transport: reaches the clients.
        num_rounds: the last round.
        seed: of the run.
        start: rounds already done.
        server_state: the state after round `start`, or None to begin.
        agreement: fingerprint that the clients compare with theirs, see `client.agreement`.
        downlink: how the model travels to the clients; whole in every round without one.
        secret: 256 random bits on which the server's noise hangs instead of `seed`.

    Raises:
        RecipeError: if params or clients do not fit the uplink; at once, not in the first round.
    """
    if params.dtype != torch.float32 or params.shape != (uplink.size,):
        raise RecipeError(
            f"federate.params: got {params.dtype} {list(params.shape)}, expected torch.float32 [{uplink.size}]"
        )
    if len(transport.clients()) != uplink.cohort.population:
        raise RecipeError(
            f"federate.population: planned for {uplink.cohort.population} clients, there are {len(transport.clients())}"
        )
    state = _init(params, uplink, algorithm) if server_state is None else dict(server_state)
    todo = range(start + 1, num_rounds + 1)
    server = _Server(uplink, algorithm, transport, seed, agreement, downlink, secret)
    return server.rounds(params, state, todo)


def _init(params: Tensor, uplink: Uplink, algorithm: Algorithm) -> ServerState:
    return _join(
        {
            "optimizer": algorithm.server_init(params),
            "uplink": uplink.init(),
            "downlink": {},
            "clients": {},
        }
    )


@dataclass(frozen=True, eq=False)
class _Server:
    """What stays the same from round to round."""

    uplink: Uplink
    algorithm: Algorithm
    transport: Transport
    seed: int
    agreement: str
    downlink: Downlink | None
    secret: int | None

    def rounds(self, params: Tensor, state: ServerState, todo: range) -> Iterator[RoundRecord]:
        if not todo:
            return
        clients = self.transport.clients()
        began, before = perf_counter(), self.transport.traffic
        session = self.uplink.aggregator.open(self.transport, self.agreement)
        if (
            todo.start > 1
        ):  # the keys of a run count in its first round, not each time that it goes on
            began, before = perf_counter(), self.transport.traffic
        for round in todo:
            parts = _split(state)
            cohort = self.uplink.cohort.draw(clients, seed=self.secret or self.seed, round=round)
            broadcast = None
            if self.downlink is not None:
                broadcast = Broadcast.open(self.downlink, self.seed, clients, parts["downlink"])
            counted = Counted.open(clients, parts["clients"])
            header = self._header(round, session.invite(cohort), parts["uplink"])
            beside = self.algorithm.server_down(parts["optimizer"])
            requests = _requests(cohort, header, round, {PARAMS: params, **beside}, broadcast)
            if self.algorithm.keeps_state:
                requests = _with_counted(requests, counted)
            replies = exchange(self.transport, requests)
            mean = self.uplink.mean(
                ordered(cohort, replies),
                seed=self.seed,
                round=round,
                session=session,
                cohort=cohort,
                state=parts["uplink"],
                secret=self.secret,
            )
            parts["uplink"] = mean.state
            if broadcast is not None:
                broadcast.arrived(mean.refused)
                parts["downlink"] = broadcast.state()
            if self.algorithm.keeps_state:
                for client in cohort:
                    counted.heard(client, round, refused=mean.refused.get(client, ""))
                parts["clients"] = counted.state()
            if mean.vectors:
                seen = Seen(round, mean.cohort, self.uplink.cohort.population)
                parts["optimizer"], params = self.algorithm.server_step(
                    parts["optimizer"], params, mean.vectors, seen
                )
                _check_finite(params, round, self.algorithm)
            state = _join(parts)
            traffic, seconds = self.transport.traffic - before, perf_counter() - began
            yield RoundRecord(
                round,
                params,
                state,
                traffic.up,
                traffic.down,
                mean.rows,
                mean.refused,
                seconds,
                mean.failures,
            )
            began, before = perf_counter(), self.transport.traffic

    def _header(
        self, round: int, invitation: dict[str, JSON], state: ServerState
    ) -> dict[str, JSON]:
        clip: dict[str, JSON] = (
            {} if self.uplink.adaptive is None else {"clip_norm": self.uplink.unit(state)}
        )
        return {"round": round, "agreement": self.agreement, **invitation, **clip}


def _check_finite(params: Tensor, round: int, algorithm: Algorithm) -> None:
    if not bool(torch.isfinite(params).all()):
        raise DivergedError(
            f"federate: the server's model is not finite after round {round}; lower federate.lr, or federate.server.lr "
            f"(the server is {algorithm.optimizer!r}); the rounds before it are kept"
        )


def _requests(
    cohort: list[ClientId],
    header: dict[str, JSON],
    round: int,
    down: Vectors,
    broadcast: Broadcast | None,
) -> dict[ClientId, Message]:
    """Returns a message for each client; those that are sent the same share one object, which is packed once.

    `down` holds the parameters, which a downlink codes, and further vectors, which travel whole.
    """
    if broadcast is None:
        return dict.fromkeys(cohort, Message("fit", header, dict(down)))
    beside = {name: vector for name, vector in down.items() if name != PARAMS}
    made: dict[int, Message] = {}
    requests = {}
    for client, (version, tensors) in broadcast.code(round, down[PARAMS], cohort).items():
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


def _join(parts: Mapping[str, Mapping[str, Tensor]]) -> ServerState:
    """Returns one table of tensors, `<part>/<name>`."""
    return {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def _split(state: Mapping[str, Tensor]) -> dict[str, ServerState]:
    """Undoes `_join`."""
    parts: dict[str, ServerState] = {
        "optimizer": {},
        "uplink": {},
        "downlink": {},
        "clients": {},
    }
    for full, tensor in state.items():
        part, _, name = full.partition("/")
        parts[part][name] = tensor
    return parts
