"""The arms of benchmarks/fields.py get what the recipe's federate stage says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fedpress.core.examples import Arrays
from fedpress.data import FederatedData
from fedpress.data.load import load
from fedpress.data.settings import DataSettings

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


def walks(folder):
    """Writes the sums of five people by the hour, sorted by person; returns `[data]`."""
    lines = ["person,hour,speed,activity"]
    for person in "abcde":
        lines += [f"{person},{hour},{hour}.5,{'rw'[hour % 2]}" for hour in range(12)]
    (folder / "walks.csv").write_text("\n".join(lines))
    return {
        "source": "csv",
        "path": str(folder / "walks.csv"),
        "client_column": "person",
        "label_column": "activity",
        "public_clients": ["a"],
        "test_clients": ["b", "e"],
        "validation": 0,
        "series": {"window": 2, "order_column": "hour"},
    }


def test_each_seed_leaves_other_people_out(tmp_path):
    fields, _ = script()
    settings = walks(tmp_path)
    assert fields.left_others_out(settings, 0) == settings
    assert fields.left_others_out(settings, 1)["test_clients"] == ["c", "b"]


def test_a_head_is_tuned_on_the_first_rows_of_a_person_and_measured_on_the_last(tmp_path):
    fields, _ = script()
    settings = walks(tmp_path)
    data = load(DataSettings(**settings), 0)
    found = list(fields.at_home(settings, data, 0))
    assert [[*one.clients] for one in found] == [["b"], ["e"]]
    for one in found:
        (own,) = one.clients.values()
        # Windows of two hours: 0 and 1, 2 and 3, ...
        assert sorted(own.x[:, 0].tolist()) == [[0.5, 1.5], [2.5, 3.5], [4.5, 5.5]]
        assert sorted(one.test.x[:, 0].tolist()) == [[6.5, 7.5], [8.5, 9.5], [10.5, 11.5]]
        assert one.preprocess == data.preprocess
    assert fields.personal(PRIVATE, "2.*") == {
        "kind": "federate",
        "num_rounds": 20,
        "epochs": 1,
        "optimizer": "adam",
        "trainable": ["2.*"],
    }
