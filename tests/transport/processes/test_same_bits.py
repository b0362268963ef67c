"""Worker processes change no bits: with convolutions, with blocks of clients, and where a worker ends.

`tests/deploy/test_engines_agree.py` has all algorithms, aggregators, codecs and kinds of privacy.
"""

import os

import pytest
import torch

from fedpress.stages.federate.client import ClientSide
from fedpress.transport.engine import LocalEngine
from fedpress.transport.processes.engine import ProcessEngine
from fedpress.transport.processes.transport import ProcessTransport
from tests.engines import CODED, MANY, RECIPE, differences, simulated

CONVOLUTIONS = RECIPE.replace('"mlp"', '"cnn"').replace(
    "in_features = 64, hidden = [8]", "in_channels = 1, image_size = 8"
)


def assert_same(one, other):
    assert not list(differences(one, other))
    assert one.traffic == other.traffic


@pytest.mark.parametrize("more", ["", CODED])
def test_processes_give_the_bits_bytes_and_records_of_one_process(more, tmp_path):
    expected = simulated(RECIPE + more)
    assert not torch.equal(expected.records[0].params, expected.records[-1].params)
    for folder in (None, tmp_path):
        engine = ProcessEngine(2)
        try:
            assert_same(expected, simulated(RECIPE + more, engine, folder))
            assert engine.latest.num_workers == 2
        finally:
            engine.end_stage()


@pytest.mark.parametrize("patience", [0.0, 0.02])
def test_convolutions_and_a_late_start_change_nothing(patience):
    text = CONVOLUTIONS + CODED
    torch.set_num_threads(2)
    try:
        expected = simulated(text, LocalEngine(real_bytes=True))
        engine = ProcessEngine(2, patience)
        try:
            assert_same(expected, simulated(text, engine))
        finally:
            engine.end_stage()
    finally:
        torch.set_num_threads(1)


WITH_STATE = CODED + 'weights = "examples"\n'


@pytest.mark.parametrize("more", ["", WITH_STATE, 'algorithm = { kind = "scaffold" }\n'])
def test_blocks_of_clients_are_added_up_in_the_workers_to_the_same_bits(
    more, monkeypatch, tmp_path
):
    expected = simulated(MANY + more)
    asked = []
    parts = ProcessTransport.parts

    def counted(self, requests, round, size):
        asked.append((len(requests), size))
        return parts(self, requests, round, size)

    monkeypatch.setattr(ProcessTransport, "parts", counted)
    for folder, patience in ((None, 0.0), (tmp_path, 0.0), (None, 0.02)):
        engine = ProcessEngine(2, patience)
        try:
            assert_same(expected, simulated(MANY + more, engine, folder))
        finally:
            engine.end_stage()
    assert asked == 6 * [(40, 2)]


def test_a_client_that_ends_its_worker_is_left_out_and_its_block_is_used(monkeypatch, caplog):
    here = os.getpid()
    answer = ClientSide.answer

    def ending(self, message):
        if self.name == "c3" and message.kind in ("fit", "evaluate"):
            if os.getpid() != here:
                os._exit(3)
            raise RuntimeError("it ends its process")
        return answer(self, message)

    monkeypatch.setattr(ClientSide, "answer", ending)
    expected = simulated(MANY)
    engine = ProcessEngine(2)
    try:
        found = simulated(MANY, engine)
    finally:
        engine.end_stage()
    for one, other in zip(expected.records, found.records, strict=True):
        assert torch.equal(one.params, other.params)
        assert one.clients == other.clients
        assert list(one.refused) == list(other.refused) == ["c3"]
        assert "2 worker processes have ended" in other.refused["c3"]
    assert expected.scores == found.scores
    assert "c3" not in found.scores
    assert "exit code 3" in caplog.text
