"""Computes the bytes of a federate stage's messages before it runs, from example messages."""

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
from fedpress.wire.message import Message, pack, packed_size, unpack


def message_sizes(contract: Contract, params: Tensor) -> dict[str, Any]:
    """Computes the bytes of the messages, for an update with Gaussian values.

    Real updates have heavier tails and pack to fewer bytes.

    Args:
        contract: the planned stage.
        params: parameters of the model [d].

    Returns:
        Bits per value and bytes per round, from the clients ("up") and to them ("down").
        `bytes_down_first_time`: bytes of the first model that a client receives; None if each
        model is sent whole. `bytes_set_up`: bytes of the messages that exchange the keys of a
        secure sum; 0 for a plain sum.
    """
    terms = contract.terms
    uplink = contract.uplink
    chance = public_stream(0, "sizes")
    # Values about as large as in real updates, relative to the parameters. Their size matters with
    # `downlink`, where the change is added to the parameters.
    scale = 1e-3 * float(params.std()) if len(params) > 1 else 1e-3
    change = chance.normal(len(params), dtype=torch.float32) * scale
    names = list(contract.population.names)[: uplink.cohort.size]
    key = Key(terms.seed, 1, names[0])
    vectors = {UPDATE: change}
    for codec in uplink.vector_codecs:
        if codec.name != UPDATE:
            vectors[codec.name] = chance.normal(codec.size, dtype=torch.float32)
    tensors = uplink.encode(vectors, key)
    packed = uplink.packed_floats(tensors)
    header: dict[str, JSON] = {"round": 1, "examples": 1, "loss": 1.0, "steps": 1}
    # Noised counts of failures have all digits of a float64, which take more bytes than integers.
    if uplink.privacy is not None and not uplink.trust.hides_cohort:
        header["failures"] = [0.123456789012345, 0.123456789012345]
    aggregator, members = _stand_ins(contract)
    transport = LocalTransport({name: _answering(member) for name, member in members.items()})
    session = aggregator.open(transport, terms.agreement.fingerprint)
    if members:
        part = members[names[0]].mask(tensors[VALUES], round=1, cohort=names)
        # In a secure sum a client reports only the counts of failures, not its loss or examples.
        for name in ("examples", "loss", "steps"):
            del header[name]
        header["secure"] = dict(part.header)
        tensors = dict(part.tensors)
    up = packed_size(Message("update", header, tensors, packed))
    first, down = _down(contract, params, change, session.invite(names))
    size = max(1, len(params))
    cohort = uplink.cohort.size
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
    """Returns the bytes of a client's first request to train, and of each later request."""
    terms = contract.terms
    header: dict[str, JSON] = {"round": 1, "agreement": terms.agreement.fingerprint, **invitation}
    if terms.algorithm.keeps_state:
        header["counted"] = 0
    extras = {}
    for name, extra in terms.algorithm.extras_down.items():
        extras[name] = change[: extra.size].clone()
    whole = packed_size(Message("fit", header, {PARAMS: params, **extras}))
    if terms.downlink is None:
        return whole, whole
    client = contract.population.names[0]
    broadcast = Broadcast.open(terms.downlink, terms.seed, [client], {})
    sent = []
    for round, model in ((1, params), (2, params + change)):
        version, tensors = broadcast.encode_for(round, model, [client])[client]
        packed = terms.downlink.packed_floats(tensors, whole=not version)
        told = {**header, "from": version}
        sent.append(packed_size(Message("fit", told, {**tensors, **extras}, packed)))
        broadcast.mark_arrived({})
    return sent[0], sent[1]


def _stand_ins(contract: Contract) -> tuple[Aggregator, dict[ClientId, SecAggClient]]:
    """Returns the server's and the clients' side of a secure sum, with made-up keys.

    The real keys are secret and not known here. Messages with made-up keys have the same length.
    For a plain sum there are no clients.
    """
    aggregator = contract.uplink.aggregator
    grid = contract.protection.grid
    if grid is None:
        return aggregator, {}
    keys = {name: random.secret_key(0, "stand-in", name) for name in contract.population.names}
    known = {name: identity(key) for name, key in keys.items()}
    run = contract.terms.agreement.fingerprint
    members = {name: SecAggClient(name, key, grid.plan, known, run) for name, key in keys.items()}
    return SecureSum(grid.plan, grid.size, grid.limit, tuple(known.items())), members


def _answering(member: SecAggClient) -> Handler:
    return lambda request: pack(answer_secure(member, unpack(request)))
