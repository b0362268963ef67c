"""Rounds in worker processes end in the bits, bytes and records of rounds in one process."""

import os
import sys
from dataclasses import asdict, replace

import pytest
import torch

from fedpress.core import parameters
from fedpress.federation import Client, Start
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.binding import bind
from fedpress.stages.federate.client import ClientSide
from fedpress.transport.engine import LocalEngine
from fedpress.transport.processes.engine import ProcessEngine
from fedpress.transport.processes.transport import ProcessTransport

RECIPE = """
[data]
source = "digits"
num_clients = 5
examples_per_client = 20
validation = 20
[model]
architecture = "{model}"
arguments = {{ {arguments} }}
[[stage]]
kind = "federate"
num_rounds = 3
batch_size = 10
"""
SMALL = RECIPE.format(model="mlp", arguments="in_features = 64, hidden = [8]")
CONVOLUTIONS = RECIPE.format(model="cnn", arguments="in_channels = 1, image_size = 8")
CODED = """
uplink = [{ kind = "topk", density = 0.2 }, { kind = "quantize", bits = 8 }]
error_feedback = true
downlink = [{ kind = "quantize", bits = 8 }]
"""
SEED = "secure_noise = false"
CASES = {
    "fedavg": "",
    "examples": 'weights = "examples"\noptimizer = "adamw"\n',
    "fedprox": 'algorithm = { kind = "fedprox", proximal_mu = 0.1 }\n',
    "fedavgm": 'algorithm = { kind = "fedavgm" }\n',
    "fedadam": 'algorithm = { kind = "fedadam" }\n',
    "scaffold": 'algorithm = { kind = "scaffold" }\ncohort = 3\n',
    "qfedavg": 'algorithm = { kind = "qfedavg", q = 1.0 }\nweights = "equal"\n',
    "median": 'aggregator = "median"\nweights = "equal"\n',
    "trimmed": 'aggregator = { kind = "trimmed", beta = 0.2 }\nweights = "equal"\n',
    "coded": CODED,
    "sampled": CODED + "cohort = 2\n",
    "randomk": 'uplink = [{ kind = "randomk", density = 0.3 }]\n',
    "rotated": 'uplink = [{ kind = "quantize", rate = 1.0, unbiased = true }]\n',
    "sample": f'privacy = {{ unit = "sample", noise_multiplier = 1.0, delta = 1e-3, {SEED} }}\n',
    "client": f'privacy = {{ unit = "client", noise_multiplier = 1.0, delta = 1e-3, {SEED} }}\n',
    "adaptive": 'privacy = { unit = "client", noise_multiplier = 1.0, delta = 1e-3, '
    f"adaptive = {{}}, {SEED} }}\n",
    "secure": 'aggregator = "secure"\nweights = "equal"\n',
    "distributed": 'privacy = { unit = "client", trust = "distributed", noise_multiplier = 2.0, '
    f"delta = 1e-3, {SEED} }}\n",
    "spare": CODED + 'cohort = 2\nschedule = { kind = "synchronous", over_selection = 2.0 }\n'
    'delays = { kind = "lognormal", median = 10.0 }\n',
    "first": CODED + 'cohort = 2\nschedule = { kind = "synchronous", over_selection = 2.0 }\n',
    "buffered": 'schedule = { kind = "buffered", concurrency = 3, buffer = 2 }\n'
    'delays = { kind = "lognormal", median = 10.0 }\n',
}


def finished(loaded, engine, folder=None):
    """Runs all rounds; returns the records without seconds, the traffic, and the clients' scores."""
    state = replace(first_state(loaded, load_data(loaded)), engine=engine)
    server = bind(loaded.stage[0], state, folder).server
    records = list(server.rounds(Start(parameters.flatten(server.model))))
    scores = server.client_scores(records[-1].params)
    return records, server.transport.traffic, scores, getattr(server.transport, "num_workers", 0)


def assert_same(one, other):
    for mine, theirs in zip(one[0], other[0], strict=True):
        assert torch.equal(mine.params, theirs.params)
        mine, theirs = asdict(mine), asdict(theirs)
        for record in (mine, theirs):
            del record["seconds"], record["params"]
        states = mine.pop("server_state"), theirs.pop("server_state")
        assert states[0].keys() == states[1].keys()
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), name
        assert mine == theirs
    assert one[1:3] == other[1:3]


@pytest.mark.parametrize("case", CASES)
def test_processes_give_the_bits_bytes_and_records_of_one_process(case, tmp_path):
    loaded = recipes.load(SMALL + CASES[case])
    expected = finished(loaded, LocalEngine())
    assert not torch.equal(expected[0][0].params, expected[0][-1].params)
    for folder in (None, tmp_path):
        engine = ProcessEngine(2)
        try:
            found = finished(loaded, engine, folder)
            assert found[3] == 2
            assert_same(expected, found)
        finally:
            engine.end_stage()


@pytest.mark.parametrize("patience", [0.0, 0.02])
def test_convolutions_and_a_late_start_change_nothing(patience):
    loaded = recipes.load(CONVOLUTIONS + CASES["coded"])
    torch.set_num_threads(2)
    try:
        expected = finished(loaded, LocalEngine(real_bytes=True))
        engine = ProcessEngine(2, patience)
        try:
            assert_same(expected, finished(loaded, engine))
        finally:
            engine.end_stage()
    finally:
        torch.set_num_threads(1)


MANY = SMALL
for old, new in {
    "num_clients = 5": "num_clients = 40",
    "_client = 20": "_client = 4",
    "size = 10": "size = 2",
}.items():
    MANY = MANY.replace(old, new)
WITH_STATE = CODED + 'weights = "examples"\n'


@pytest.mark.parametrize("more", ["", WITH_STATE, 'algorithm = { kind = "scaffold" }\n'])
def test_blocks_of_clients_are_added_up_in_the_workers_to_the_same_bits(
    more, monkeypatch, tmp_path
):
    loaded = recipes.load(MANY + more)
    expected = finished(loaded, LocalEngine())
    asked = []
    parts = ProcessTransport.parts

    def counted(self, requests, round, size):
        asked.append((len(requests), size))
        return parts(self, requests, round, size)

    monkeypatch.setattr(ProcessTransport, "parts", counted)
    for folder, patience in ((None, 0.0), (tmp_path, 0.0), (None, 0.02)):
        engine = ProcessEngine(2, patience)
        try:
            assert_same(expected, finished(loaded, engine, folder))
        finally:
            engine.end_stage()
    assert asked == 9 * [(40, 2)]


def test_a_client_that_ends_its_worker_is_left_out_and_its_block_is_used(monkeypatch, caplog):
    loaded = recipes.load(MANY)
    here = os.getpid()
    answer = ClientSide.answer

    def ending(self, message):
        if self.name == "c3" and message.kind in ("fit", "evaluate"):
            if os.getpid() != here:
                os._exit(3)
            raise RuntimeError("it ends its process")
        return answer(self, message)

    monkeypatch.setattr(ClientSide, "answer", ending)
    expected = finished(loaded, LocalEngine())
    engine = ProcessEngine(2)
    try:
        found = finished(loaded, engine)
    finally:
        engine.end_stage()
    for one, other in zip(expected[0], found[0], strict=True):
        assert torch.equal(one.params, other.params)
        assert one.clients == other.clients
        assert list(one.refused) == list(other.refused) == ["c3"]
        assert "2 worker processes have ended" in other.refused["c3"]
    assert expected[2] == found[2]
    assert "c3" not in found[2]
    assert "exit code 3" in caplog.text


def test_a_client_whose_code_calls_exit_is_refused_and_ends_nothing(monkeypatch):
    loaded = recipes.load(SMALL)
    answer = Client.answer

    def exiting(self, message):
        if self.name == "c3" and message.kind == "fit":
            sys.exit("enough")
        return answer(self, message)

    monkeypatch.setattr(Client, "answer", exiting)
    expected = finished(loaded, LocalEngine())
    engine = ProcessEngine(2)
    try:
        assert_same(expected, finished(loaded, engine))
    finally:
        engine.end_stage()
    for record in expected[0][1:]:
        assert list(record.refused) == ["c3"]
        assert "called sys.exit('enough')" in record.refused["c3"]
