"""The loop of federated learning as a generator: draw a cohort, send, sum, step, yield. No evaluation, no files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from fedpress.errors import RecipeError
from fedpress.federate.algorithms import Algorithm, ServerState
from fedpress.federate.exchange import ClientId, Transport, ordered
from fedpress.federate.uplink import Uplink
from fedpress.wire.message import JSON, Message


@dataclass(frozen=True, eq=False)
class RoundRecord:
    """The end of one round, with all that is needed to go on from there.

    Attributes:
        round: how many rounds are done, from 1; give it as `start` to go on.
        params: the new parameters [d] float32.
        server_state: of the server optimizer; give it as `server_state` to go on.
        bytes_up: size of all messages from the clients in this round.
        bytes_down: size of all messages to them.
        clients: a row for each update in the mean, in client order: client, examples, loss, update_norm, steps, as far
            as privacy allows; empty under unit "client".
        refused: clients that were drawn but do not count, with the reason.
        seconds: wall time.
    """

    round: int
    params: Tensor
    server_state: ServerState
    bytes_up: int
    bytes_down: int
    clients: list[dict[str, JSON]]
    refused: dict[ClientId, str]
    seconds: float


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
) -> Iterator[RoundRecord]:
    """Runs rounds `start` + 1 to `num_rounds`, each when the caller asks for it.

    All randomness is derived from `seed` and the number of the round, so a run that goes on from a record gives the
    same bits as one that never stopped.

    Args:
        params: the server's trainable parameters [d] float32, see `fedpress.tree`.
        uplink: how updates come home.
        algorithm: its server optimizer is used here, its local update by the clients.
        transport: reaches the clients.
        num_rounds: the last round.
        seed: of the run.
        start: rounds already done.
        server_state: the state after round `start`, or None to begin.
        agreement: fingerprint that the clients compare with theirs, see `client.agreement`.

    Raises:
        RecipeError: if params or clients do not fit the uplink; at once, not in the first round.
    """
    if params.dtype != torch.float32 or params.shape != (uplink.promise.size,):
        raise RecipeError(
            f"federate.params: got {params.dtype} {list(params.shape)}, expected torch.float32 [{uplink.promise.size}]"
        )
    if len(transport.clients()) != uplink.cohort.population:
        raise RecipeError(
            f"federate.population: planned for {uplink.cohort.population} clients, there are {len(transport.clients())}"
        )
    state = algorithm.server.init(params) if server_state is None else server_state
    return _rounds(params, state, uplink, algorithm, transport, range(start + 1, num_rounds + 1), seed, agreement)


def _rounds(
    params: Tensor,
    state: ServerState,
    uplink: Uplink,
    algorithm: Algorithm,
    transport: Transport,
    todo: range,
    seed: int,
    agreement: str,
) -> Iterator[RoundRecord]:
    for round in todo:
        began, before = perf_counter(), transport.traffic
        cohort = uplink.cohort.draw(transport.clients(), seed=seed, round=round)
        fit = Message("fit", {"round": round, "agreement": agreement}, {"params": params})
        replies = transport.exchange(dict.fromkeys(cohort, fit))
        mean = uplink.mean(ordered(cohort, replies), seed=seed, round=round)
        if mean.update is not None:
            state, params = algorithm.server.step(state, params, mean.update)
        traffic, seconds = transport.traffic - before, perf_counter() - began
        yield RoundRecord(round, params, state, traffic.up, traffic.down, mean.rows, mean.refused, seconds)
