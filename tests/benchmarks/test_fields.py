"""The arms of benchmarks/fields.py get what the recipe's federate stage says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fedpress.core.examples import Arrays
from fedpress.data import FederatedData

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fields.py"


def test_all_arms_train_as_long_as_a_client_of_the_federation():
    spec = importlib.util.spec_from_file_location("fields", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fields = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fields)
    one = Arrays(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    data = FederatedData("four", dict.fromkeys("abcd", one), one, one, one, 1, ("only",))
    stage = {"kind": "federate", "num_rounds": 10, "epochs": 2, "cohort": 2, "optimizer": "adam"}
    found = list(fields.arms([{**stage, "privacy": {"unit": "client"}}], data, alone=2))
    assert [name for name, _, _ in found] == ["local", "local", "pooled", "federated", "private"]
    # A client is in every second round, so it trains for 5 x 2 epochs.
    alone = {"kind": "train", "epochs": 10, "optimizer": "adam"}
    assert [stages for name, stages, _ in found[:3]] == [[alone]] * 3
    assert len(found[2][2].public) == 12
    assert found[3][1] == [stage]
