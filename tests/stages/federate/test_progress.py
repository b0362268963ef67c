"""A checkpoint of the rounds holds all that the next round needs."""

import json
from dataclasses import fields, replace

import pytest
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
    set_up=(30, 40),
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


@pytest.mark.parametrize(("entry", "then"), [("failures", Failures()), ("set_up", None)])
def test_a_checkpoint_from_before_an_entry_was_added_opens(entry, then):
    saved = NOW.snapshot()
    facts = {name: value for name, value in saved.facts.items() if name != entry}
    assert getattr(Progress.load(replace(saved, facts=facts)), entry) == then
