"""A recipe in words: an owner reads whatever could harm."""

import pytest

from fedpress.network.words import words_of
from fedpress.stages.federate.settings import FederateSettings

PRIVATE = {"unit": "sample", "epsilon": 2.0, "delta": 1e-5, "secure_noise": True}


def words(labels=(), **keys) -> str:
    stage = FederateSettings.model_validate({"kind": "federate", **keys})
    return " ".join(words_of(stage, "mlp", {"hidden": [8]}, labels))


@pytest.mark.parametrize(
    ("keys", "said", "unsaid"),
    [
        ({}, "PROMISES NO DIFFERENTIAL PRIVACY", "epsilon"),
        ({}, "sees this client's update by itself", "only the sum"),
        ({}, "the score of the final model", "with noise"),
        ({"aggregator": "secure"}, "keys THAT FOLLOW FROM THE SEED", "by itself"),
        ({"aggregator": "secure", "secure_keys": True}, "drawn on this machine", "THE SEED"),
        ({"privacy": PRIVATE}, "Protects single rows: epsilon 2 at delta 1e-05", "PROMISES NO"),
        ({"privacy": PRIVATE}, "this client adds the noise itself", "the score"),
        ({"privacy": {**PRIVATE, "secure_noise": False}}, "THE NOISE FOLLOWS FROM THE SEED", "x"),
        (
            {"privacy": {**PRIVATE, "unit": "client"}},
            "all rows of this client together: epsilon 2 at delta 1e-05; the server adds the noise",
            "the number of rows",
        ),
        ({"cohort": 5}, "Asks 5 clients in each of 10 rounds", "all clients"),
        ({"labels": ("age",)}, "Predicts the columns age.", "x"),
        ({"trainable": ("fc.*",)}, "(only fc.*)", "x."),
    ],
)
def test_what_a_recipe_asks_for_is_said(keys, said, unsaid):
    assert said in words(**keys)
    assert unsaid == "x" or unsaid not in words(**keys)
