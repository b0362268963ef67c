"""A client answers one request a round; equal requests of many clients are hashed once."""

import pytest
import torch

from fedpress.core import random
from fedpress.errors import WireError
from fedpress.federation import InMemoryState
from fedpress.federation.client_state import load_json
from fedpress.federation.replay import FINGERPRINT_DIGITS, answer_once
from fedpress.wire import Message


class Terms:
    num_rounds = 5
    max_tasks = 2


def message(header, **tensors):
    return Message("fit", header, tensors)


def stored(memory):
    return load_json(memory, "answered")["1"]


def test_clients_that_get_the_same_tensors_share_one_hash_of_the_right_value(monkeypatch):
    hashed = []
    fingerprint = random.fingerprint

    def counted(*parts):
        hashed.append(1)
        return fingerprint(*parts)

    monkeypatch.setattr(random, "fingerprint", counted)
    one, other = torch.arange(5.0), torch.arange(5.0) + 1
    requests = [
        ({"round": 1}, {"params": one}, 1),
        ({"round": 1}, {"params": one}, 1),
        ({"round": 1}, {"params": other}, 2),
        ({"round": True}, {"params": other}, 3),
        ({"round": 1}, {"params": one, "more": other}, 4),
        ({"round": 1}, {"params": other, "more": one}, 5),
        # Equal, but not the same object: it could have been changed.
        ({"round": 1}, {"params": other, "more": one.clone()}, 6),
    ]
    found = []
    for header, tensors, count in requests:
        memory = InMemoryState()
        answer_once(message(header, **tensors), 1, Terms, memory)
        assert len(hashed) == count
        parts = [tensors[name] for name in sorted(tensors)]
        expected = fingerprint(sorted(header.items()), *parts)[:FINGERPRINT_DIGITS]
        assert stored(memory) == expected
        found.append(expected)
    assert len(set(found)) == 5


def test_a_second_request_of_a_round_is_refused_and_a_repeated_one_is_not():
    memory = InMemoryState()
    params = torch.arange(5.0)
    answer_once(message({"round": 1}, params=params), 1, Terms, memory)
    answer_once(message({"round": 1}, params=params.clone()), 1, Terms, memory)
    with pytest.raises(WireError, match="answered a different request of round 1"):
        answer_once(message({"round": 1}, params=params + 1), 1, Terms, memory)
    answer_once(message({"round": 2}, params=params), 2, Terms, memory)
    with pytest.raises(WireError, match="answered 2 tasks"):
        answer_once(message({"round": 3}, params=params), 3, Terms, memory)
    with pytest.raises(WireError, match="planned for 5 rounds"):
        answer_once(message({"round": 6}, params=params), 6, Terms, memory)
