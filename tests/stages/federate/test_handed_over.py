"""A simulation whose messages are handed over ends in the bits of one whose messages are bytes."""

from dataclasses import fields

import pytest
import torch

from fedpress.core import parameters
from fedpress.federation import Start
from fedpress.stages.federate.server import ServerSide
from fedpress.transport import LocalTransport
from tests.stages.federate.test_sides import CLIENT, SAMPLE, SECURE, clients_of, common

TOPK = {"kind": "topk", "density": 0.2}
INT8 = {"kind": "quantize", "bits": 8}
ROUNDS = 3
RUNS = {
    "plain": {},
    "momentum": {"server": {"kind": "momentum"}},
    "adam": {"server": {"kind": "adam", "lr": 0.1}},
    "fedprox": {"algorithm": "fedprox"},
    "qfedavg": {"algorithm": "qfedavg"},
    "scaffold": {"algorithm": "scaffold"},
    "scaffold, coded": {"algorithm": {"kind": "scaffold", "uplink": [INT8]}, "cohort": 2},
    "lossless": {"uplink": [{"kind": "lossless"}]},
    "topk with feedback": {"uplink": [TOPK], "error_feedback": True},
    "rate": {"uplink": [{"kind": "quantize", "rate": 1.0}], "error_feedback": True},
    "unbiased": {"uplink": [{"kind": "quantize", "rate": 1.0, "unbiased": True}]},
    "randomk": {"uplink": [{"kind": "randomk"}], "error_feedback": True},
    "lowrank": {"uplink": [{"kind": "lowrank", "rank": 1}]},
    "powers": {"uplink": [{"kind": "powers"}]},
    "sign": {"uplink": [{"kind": "sign"}]},
    "ternary": {"uplink": [{"kind": "ternary"}]},
    "clip": {"uplink": [{"kind": "clip", "clip_norm": 0.01}], "error_feedback": True},
    "downlink": {"downlink": [INT8], "cohort": 2},
    "downlink, first model whole": {"downlink": [TOPK], "first_downlink": [], "cohort": 2},
    "median": {"aggregator": "median"},
    "trimmed": {"aggregator": "trimmed"},
    "buffered": {"schedule": {"kind": "buffered", "buffer": 2, "concurrency": 3}},
    "batch norm": {"norm": "batch"},
    "sample": {"privacy": SAMPLE},
    "sample, central": {"privacy": SAMPLE | {"trust": "central"}},
    "sample, distributed": {"privacy": SAMPLE | {"trust": "distributed"}},
    "client": {"privacy": CLIENT},
    "client, adaptive": {"privacy": CLIENT | {"adaptive": {}}},
    "client, distributed": {"privacy": SECURE},
    "secure sum": {"aggregator": "secure"},
}


def observed(keys, as_bytes):
    """All that a run leaves behind, and the tensors that were handed over with copies of them."""
    clients = clients_of(common(num_rounds=ROUNDS, **keys))
    handed = []

    def noted(message):
        handed.extend((tensor, tensor.clone()) for tensor in message.tensors.values())
        return message

    if as_bytes:
        transport = LocalTransport({name: client.handle for name, client in clients.items()})
    else:
        transport = LocalTransport.of_messages(
            {
                name: lambda message, client=client: noted(client.answer(noted(message)))
                for name, client in clients.items()
            }
        )
    server = ServerSide.bind(common(num_rounds=ROUNDS, **keys), transport)
    seen = []
    for record in server.rounds(Start(parameters.flatten(server.model))):
        seen.append([getattr(record, one.name) for one in fields(record) if one.name != "seconds"])
        seen.append(server.client_scores(record.params))
    for client in clients.values():
        # What a member of a secure sum has answered is stored only where it is masked.
        notes = {name: note for name, note in client.memory.notes.items() if name != "member"}
        seen += [client.memory.rounds, notes]
    return seen, transport.traffic, handed


def bits(value):
    """`value` with each tensor replaced by its bits, so that it can be compared."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [bits(inner) for inner in value]
    return value


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_messages_ends_in_the_bits_and_the_bytes_of_a_run_of_bytes(name):
    one, its_traffic, handed = observed(RUNS[name], as_bytes=False)
    other, traffic, _ = observed(RUNS[name], as_bytes=True)
    assert bits(one) == bits(other)
    assert its_traffic == traffic
    for tensor, before in handed:
        assert bits(tensor) == bits(before)
