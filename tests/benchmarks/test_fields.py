"""The arms of benchmarks/fields.py get what the recipe's federate stage says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fedpress.core.examples import Arrays
from fedpress.data import FederatedData

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fields.py"


def script():
    """Returns the script as a module, and data of four clients of three examples."""
    spec = importlib.util.spec_from_file_location("fields", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    fields = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fields)
    one = Arrays(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    data = FederatedData("four", dict.fromkeys("abcd", one), one, one, one, 1, ("only",))
    return fields, data


STAGE = {"kind": "federate", "num_rounds": 10, "epochs": 2, "cohort": 2, "optimizer": "adam"}
PRIVATE = {**STAGE, "privacy": {"unit": "client"}}


def test_all_arms_train_as_long_as_a_client_of_the_federation():
    fields, data = script()
    found = list(fields.arms([PRIVATE], data, 2, {}))
    assert [name for name, _, _ in found] == ["local", "local", "pooled", "federated", "private"]
    # A client is in every second round, so it trains for 5 x 2 epochs.
    alone = {"kind": "train", "epochs": 10, "optimizer": "adam"}
    assert [stages for name, stages, _ in found[:3]] == [[alone]] * 3
    assert len(found[2][2].public) == 12
    assert found[3][1] == [STAGE]


def test_the_arms_without_privacy_have_keys_of_their_own():
    fields, data = script()
    found = {arm: stages for arm, stages, _ in fields.arms([PRIVATE], data, 1, {"num_rounds": 4})}
    assert found["local"][0]["epochs"] == found["pooled"][0]["epochs"] == 4
    assert found["federated"] == [{**STAGE, "num_rounds": 4}]
    assert found["private"] == [PRIVATE]
