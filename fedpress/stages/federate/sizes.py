"""The bytes of a stage's messages before it runs, from public facts: real messages, with keys that stand in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedpress.codecs import VALUES, Key
from fedpress.core import random
from fedpress.core.canonical import JSON
from fedpress.core.names import ClientId
from fedpress.core.random_source import public_stream
from fedpress.federation import Aggregator, SecureSum
from fedpress.federation.downlink import Broadcast
from fedpress.federation.secure_client import answer_secure
from fedpress.federation.vectors import PARAMS, UPDATE
from fedpress.secagg import SecAggClient, identity
from fedpress.stages.federate.contract import Contract
from fedpress.transport import Handler, LocalTransport
from fedpress.wire.message import Message, pack, unpack


def sizes(contract: Contract, params: Tensor) -> dict[str, Any]:
    """Returns the bytes of real messages, and bits for each value, with an update of Gaussian noise.

    Updates of real training have heavier tails and become smaller. `params` [d] are those of the
    model. `bytes_set_up` are those of the keys of a secure sum, 0 for a plain one.
    """
    terms, uplink = contract.terms, contract.uplink
    chance = public_stream(0, "sizes")
    change = chance.normal(len(params), dtype=torch.float32) * (
        1e-3 * float(params.std()) if len(params) > 1 else 1e-3
    )
    names = list(contract.population.names)[: uplink.cohort.size]
    key = Key(terms.seed, 1, names[0])
    vectors = {
        codec.name: chance.normal(codec.size, dtype=torch.float32) for codec in uplink.vector_codecs
    }
    tensors = uplink.encode(vectors | {UPDATE: change}, key)
    header: dict[str, JSON] = {"round": 1, "examples": 1, "loss": 1.0, "steps": 1}
    if uplink.privacy is not None and not uplink.trust.hides_cohort:
        header["failures"] = [0.123456789012345, 0.123456789012345]
    aggregator, members = _stand_ins(contract)
    transport = LocalTransport({name: _answering(member) for name, member in members.items()})
    session = aggregator.open(transport, terms.agreement.fingerprint)
    if members:
        part = members[names[0]].mask(tensors[VALUES], round=1, cohort=names)
        # In a secure sum a client says nothing of its training, only what failed.
        for name in ("examples", "loss", "steps"):
            del header[name]
        header["secure"] = dict(part.header)
        tensors = dict(part.tensors)
    up = len(pack(Message("update", header, tensors)))
    first, down = _down(contract, params, change, session.invite(names))
    size, cohort = max(1, len(params)), uplink.cohort.size
    set_up = transport.traffic.up + transport.traffic.down
    return {
        "bits_per_value_up": 8 * up / size,
        "bits_per_value_down": 8 * down / size,
        "bytes_up_per_round": up * cohort,
        "bytes_down_per_round": down * cohort,
        "bytes_down_first_time": first if terms.downlink is not None else None,
        "bytes_set_up": set_up,
    }


def _down(
    contract: Contract, params: Tensor, change: Tensor, invitation: dict[str, JSON]
) -> tuple[int, int]:
    """Returns the bytes of the first message that brings a model, and those of each later one."""
    terms = contract.terms
    said: dict[str, JSON] = {"round": 1, "agreement": terms.agreement.fingerprint, **invitation}
    if terms.algorithm.keeps_state:
        said["counted"] = 0
    # As full of numbers as in later rounds: what is zero at the beginning packs to nothing.
    sizes = {name: extra.size for name, extra in terms.algorithm.extras_down.items()}
    beside = {name: change[:size].clone() for name, size in sizes.items()}
    whole = len(pack(Message("fit", said, {PARAMS: params, **beside})))
    if terms.downlink is None:
        return whole, whole
    client = contract.population.names[0]
    broadcast, sent = Broadcast.open(terms.downlink, terms.seed, [client], {}), []
    for round, model in ((1, params), (2, params + change)):
        version, tensors = broadcast.encode_for(round, model, [client])[client]
        sent.append(len(pack(Message("fit", {**said, "from": version}, {**tensors, **beside}))))
        broadcast.mark_arrived({})
    return sent[0], sent[1]


def _stand_ins(contract: Contract) -> tuple[Aggregator, dict[ClientId, SecAggClient]]:
    """Returns the sum and its clients with keys that anybody could make: their messages are as long as the real ones.

    A plain sum has no keys, so nobody stands in.
    """
    aggregator, grid = contract.uplink.aggregator, contract.protection.grid
    if grid is None:
        return aggregator, {}
    keys = {name: random.secret_key(0, "stand-in", name) for name in contract.population.names}
    known = {name: identity(key) for name, key in keys.items()}
    run = contract.terms.agreement.fingerprint
    members = {name: SecAggClient(name, key, grid.plan, known, run) for name, key in keys.items()}
    return SecureSum(grid.plan, grid.size, grid.limit, tuple(known.items())), members


def _answering(member: SecAggClient) -> Handler:
    return lambda request: pack(answer_secure(member, unpack(request)))
