"""A checkpoint of the rounds holds all that the next round needs."""

import json
from dataclasses import fields, replace

import torch

from fedpress.federation.failures import Tally
from fedpress.privacy.ledger import Ledger, LedgerEntry
from fedpress.stages.federate.failures import Failures
from fedpress.stages.federate.progress import Progress
from fedpress.workspace.drive import Snapshot

LEDGER = Ledger("client").add(LedgerEntry("a", "federate", 0.5, 2.0, 3, 1, 3))
FAILURES = Failures(
    4, {"a": (1, "no reply came")}, Tally(0.5, 1.5), 4.0, 2.0, ((0.5, 1.5, 4.0, 2.0),)
)
NOW = Progress(
    params=torch.arange(3.0),
    ledger=LEDGER,
    server_state={"optimizer/velocity": torch.ones(3)},
    round=5,
    best=0.75,
    best_round=4,
    bytes_up=100,
    bytes_down=200,
    note="validation 75.0%",
    closed=1,
    failures=FAILURES,
)


def through_json(saved: Snapshot) -> Snapshot:
    return Snapshot(saved.tensors, json.loads(json.dumps(dict(saved.facts))))


def test_what_is_loaded_is_what_was_saved():
    again = Progress.load(through_json(NOW.snapshot()))
    for one in fields(Progress):
        saved, loaded = getattr(NOW, one.name), getattr(again, one.name)
        if one.name == "params":
            assert torch.equal(saved, loaded)
        elif one.name == "server_state":
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        else:
            assert saved == loaded, one.name


def test_a_checkpoint_without_a_count_of_failures_opens():
    saved = NOW.snapshot()
    facts = {name: value for name, value in saved.facts.items() if name != "failures"}
    assert Progress.load(replace(saved, facts=facts)).failures == Failures()
