"""Clients in one program: the numbers, bytes and failures of clients one after another."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from torch import nn

import fedpress
from fedpress.errors import RunError
from fedpress.federation.exchange import exchange
from fedpress.pipeline import recipe as recipes
from fedpress.transport import stacked as transport_module
from fedpress.transport.engine import AutoEngine, LocalEngine, StackedEngine
from fedpress.transport.stacked import StackedTransport, Trial
from fedpress.wire import Message
from tests.federation.federation import Federation, run_rounds
from tests.transport.processes.test_same_bits import (
    CASES,
    CONVOLUTIONS,
    SMALL,
    finished,
)

REFUSED = {"fedprox": "corrects the gradients", "scaffold": "corrects", "sample": "unit 'sample'"}
EXACT = ("fedavg", "examples", "fedavgm", "fedadam", "qfedavg", "median", "trimmed", "buffered")
"""Cases without a codec, so that rounding stays rounding."""


SERVER_NOISE = ("client", "adaptive")
"""Cases whose noise is another one if the sum has another last bit; with little noise the rest can be
compared."""
SLOW = ("rotated", "distributed", "secure")
STACKED = [
    pytest.param(case, marks=pytest.mark.recipe if case in SLOW else ())
    for case in CASES
    if case not in REFUSED
]


@pytest.mark.parametrize("case", STACKED)
def test_stacks_give_the_numbers_and_bytes_of_clients_one_after_another(case):
    text = SMALL + CASES[case]
    if case in SERVER_NOISE:
        text = text.replace("noise_multiplier = 1.0", "noise_multiplier = 0.001")
    loaded = recipes.load(text)
    expected = finished(loaded, LocalEngine())
    engine = StackedEngine()
    found = finished(loaded, engine)
    assert engine.rounding == "stacked"
    # Every "fit" was trained in a stack, also those whose answers nobody waited for.
    assert engine.latest.stacked >= sum(len(record.clients) for record in found[0])
    moved = expected[0][-1].params - expected[0][0].params
    for mine, theirs in zip(found[0], expected[0], strict=True):
        # A codec turns another last bit into another level, in few values.
        share = 1e-4 if case in EXACT else 0.1
        assert (mine.params - theirs.params).norm() < share * moved.norm()
        assert mine.bytes_down == theirs.bytes_down
        assert mine.refused == theirs.refused
        assert [row["client"] for row in mine.clients] == [row["client"] for row in theirs.clients]
    # The header of an update has digits of the loss.
    assert abs(found[1].up - expected[1].up) <= 0.01 * expected[1].up


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stacked_is_told_with_the_way_round(case):
    loaded = recipes.load(SMALL + CASES[case])
    with pytest.raises(RunError, match=REFUSED[case]) as told:
        finished(loaded, StackedEngine())
    assert str(told.value).endswith('give engine="local", which trains one after another')
    engine = StackedEngine(tries=True)
    found = finished(loaded, engine)
    assert engine.rounding == ""
    expected = finished(loaded, LocalEngine())
    assert torch.equal(found[0][-1].params, expected[0][-1].params)


def sizes_of_stacks(monkeypatch) -> list[int]:
    """Returns a list to which the size of each stack is added."""
    sizes = []
    together = transport_module.train_together
    monkeypatch.setattr(
        transport_module,
        "train_together",
        lambda trainings: sizes.append(len(trainings)) or together(trainings),
    )
    return sizes


def test_convolutions_are_stacked_in_groups_of_a_given_size(monkeypatch):
    sizes = sizes_of_stacks(monkeypatch)
    loaded = recipes.load(CONVOLUTIONS)
    expected = finished(loaded, LocalEngine())[0][-1].params
    found = finished(loaded, StackedEngine(at_once=2))[0][-1].params
    assert sizes == [2, 2, 1] * 3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


class Branches(nn.Module):
    """Its way depends on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x if x.mean() > 0 else -x)


class Direct:
    """A client of `Federation` as an engine has it."""

    memory = None

    def __init__(self, client) -> None:
        self.client = client
        self.answer = client.answer
        self.answer_trained = client.answer_trained
        self.training = client.training
        self.num_examples = len(client.arrays)


def transport_to(federation, **more) -> StackedTransport:
    sides = {name: Direct(client) for name, client in federation.clients.items()}
    return StackedTransport(sides, **more)


def test_a_network_that_torch_cannot_stack_is_trained_alone_on_trial():
    federation = Federation(model=Branches())
    with pytest.raises(RunError, match="data-dependent control flow"):
        list(run_rounds(federation, 1, transport=transport_to(federation)))
    (expected,) = run_rounds(Federation(model=federation.model), 1)
    tried = Trial({False: [1.0] * 3, True: []})
    (found,) = run_rounds(federation, 1, transport=transport_to(federation, trial=tried))
    assert torch.equal(found.params, expected.params)


class Large(nn.Module):
    """Does not fit into memory for several clients at once, or never, after some attempts."""

    def __init__(self, attempts: int = 100) -> None:
        super().__init__()
        self.attempts = attempts
        self.asked = 0
        self.inner = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += 1
        # Inside `vmap` torch knows only the size of one client's batch.
        if torch.func.debug_unwrap(x) is not x and self.asked <= self.attempts:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


def test_too_little_memory_is_told_with_a_smaller_stack_as_a_cure():
    federation = Federation(model=Large())
    for more in ({}, {"at_once": 4}):
        running = run_rounds(federation, 1, transport=transport_to(federation, **more))
        with pytest.raises(RunError, match=r"memory of the device.* smaller engine.at_once"):
            next(running)


def test_with_too_little_memory_fewer_clients_are_trained_together(monkeypatch):
    sizes = sizes_of_stacks(monkeypatch)
    federation = Federation(model=Large(attempts=1))
    (record,) = run_rounds(federation, 1, transport=transport_to(federation))
    assert sizes == [4, 2, 2]
    assert len(record.clients) == 4


def test_with_too_little_memory_clients_are_trained_alone_on_trial():
    federation = Federation(model=Large())
    trial = Trial({False: [1.0] * 3, True: []})
    (record,) = run_rounds(federation, 1, transport=transport_to(federation, trial=trial))
    assert len(record.clients) == 4


def test_the_faster_way_is_taken_after_three_trials_of_each():
    for slower in (False, True):
        trial = Trial()
        taken = []
        for _ in range(8):
            taken.append(trial.stacks)
            seconds = 4.0 if trial.stacks is slower else 2.0
            # The first time is slow, and says nothing.
            first = 100.0 if len(trial.seconds[trial.stacks]) == 0 else 0.0
            trial.note(stacked=trial.stacks, seconds=seconds + first, examples=2)
        assert taken == [False] * 3 + [True] * 3 + [not slower] * 2


def test_a_trial_times_clients_alone_and_then_whole_stacks():
    federation = Federation(6)
    trial = Trial()
    transport = transport_to(federation, trial=trial)
    for round in (1, 2, 3, 4):
        requests = dict.fromkeys(federation.clients, federation.fit(round))
        assert all(reply.kind == "update" for _, reply in exchange(transport, requests))
        assert len(trial.seconds[False]) == 3
        assert len(trial.seconds[True]) == min(round, 3)
        if round < 4:
            assert transport.stacked == 3 + 6 * (round - 1)


def test_a_client_that_refuses_its_request_fails_alone():
    federation = Federation()
    transport = transport_to(federation)
    requests: dict[str, Message] = dict.fromkeys(federation.clients, federation.fit())
    header = {**requests["c1"].header, "agreement": "another"}
    requests["c1"] = replace(requests["c1"], header=header)
    replies = dict(exchange(transport, requests))
    assert {name: reply.kind for name, reply in replies.items()} == {
        **dict.fromkeys(federation.clients, "update"),
        "c1": "error",
    }
    assert "settings, seed or model differ" in replies["c1"].header["reason"]
    assert transport.stacked == 3


def test_requests_of_two_rounds_are_not_mixed():
    federation = Federation(settings=Federation().settings.model_copy(update={"lr_decay": 0.5}))
    alone = {name: client.answer for name, client in federation.clients.items()}
    requests = {name: federation.fit(1 + int(name == "c2")) for name in federation.clients}
    for name, reply in exchange(transport_to(federation), requests):
        expected = alone[name](requests[name])
        torch.testing.assert_close(reply.tensors["values"], expected.tensors["values"])


def test_a_cancelled_request_is_forgotten():
    federation = Federation()
    transport = transport_to(federation)
    first = transport.send("c0", federation.fit())
    second = transport.send("c1", federation.fit())
    transport.cancel([first])
    assert transport.receive([first]) is None
    assert transport.receive([second])[0] == "c1"
    assert transport.stacked == 1


def test_on_a_cpu_the_default_engine_keeps_its_bits():
    engine = AutoEngine(None)
    loaded = recipes.load(SMALL)
    found = finished(loaded, engine)
    assert engine.rounding == ""
    assert torch.equal(found[0][-1].params, finished(loaded, LocalEngine())[0][-1].params)


def test_on_a_gpu_the_default_engine_tries_stacks(monkeypatch):
    monkeypatch.setattr("fedpress.transport.engine.device_of", lambda clients: torch.device("cuda"))
    engine = AutoEngine(None)
    loaded = recipes.load(SMALL)
    found = finished(loaded, engine)
    assert engine.latest.tries
    assert engine.rounding == "stacked"
    expected = finished(loaded, LocalEngine())[0][-1].params
    torch.testing.assert_close(found[0][-1].params, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.recipe
def test_records_and_result_say_that_clients_were_stacked(tmp_path):
    table = tomllib.loads(SMALL)
    done = {}
    for engine in ("local", "stacked"):
        run = fedpress.run({"name": "small", **table}, out=tmp_path / engine, engine=engine)
        lines = [line for line in run.records if "round" in line]
        assert len(lines) == 3
        stage = json.loads((tmp_path / engine / "result.json").read_text("utf-8"))["stages"][-1]
        done[engine] = [line.get("engine") for line in lines], stage.get("engine")
    assert done == {"local": ([None] * 3, None), "stacked": (["stacked"] * 3, "stacked")}
