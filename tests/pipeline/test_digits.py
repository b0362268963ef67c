"""The recipe that a new user runs first shows what fedpress is for."""

import pytest

from fedpress.pipeline import recipe as recipes
from tests.harness import finish


@pytest.mark.recipe
def test_private_clients_lift_the_accuracy_of_a_pruned_model_that_the_public_part_trained(tmp_path):
    dense, prune, tuned, federated, exported = finish(recipes.find("digits"), tmp_path / "run")[
        "stages"
    ]
    lift = federated["accuracy"] - federated["accuracy_before"]
    assert federated["accuracy_before"] == tuned["accuracy"]
    # Measured: 5.2 points at seed 0, 3.7 to 5.2 at three seeds (docs/results.md); processors round differently.
    assert lift > 0.03
    assert federated["epsilon"] <= 8
    assert federated["unit"] == "sample"
    assert prune["parameters"] < 0.42 * dense["parameters"]
    assert exported["parity"]["same_argmax_as_model"] == 1
    assert exported["test_examples"] == 539
