"""A recipe in words: an owner reads whatever could harm."""

import pytest

from fedpress.models.spec import COLUMN_SUMS
from fedpress.network.words import words_of
from fedpress.stages.federate.settings import FederateSettings
from fedpress.stages.federate.terms import Terms, query_arguments

PRIVATE = {"unit": "sample", "epsilon": 2.0, "delta": 1e-5, "secure_noise": True}


def words(labels=(), **keys) -> str:
    stage = FederateSettings.model_validate({"kind": "federate", **keys})
    return " ".join(words_of(Terms(stage, "mlp", {"hidden": [8]}, labels)))


QUERY = {"privacy": {**PRIVATE, "clip_norm": 1.0}, "num_rounds": 1}


def query_words(*columns, **keys) -> str:
    stage = FederateSettings.model_validate({"kind": "federate", **QUERY, **keys})
    return " ".join(words_of(Terms(stage, COLUMN_SUMS, query_arguments(*columns), ("ill",))))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (({"age": (0, 110)}, 0, (), False), "mean and standard deviation of age (0 to 110)"),
        (({"age": (0, 110)}, 64, (), False), "median and quartiles of age (0 to 110)"),
        (({}, 0, ("job",), False), "each word of a list that the server sends is in job."),
        (({"age": (0, 110)}, 0, (), True), "is in every column of words."),
        (({"age": (0, 110)}, 0, (), True), "how many rows have a value, for each column"),
        (({"age": (0, 110)}, 0, (), False), "Protects single rows: epsilon 2 at delta 1e-05"),
        (({"age": (0, 110)}, 0, (), False), "Trains nothing"),
    ],
)
def test_what_a_query_asks_for_is_said(columns, said):
    words = query_words(*columns)
    assert said in words
    assert "Predicts" not in words


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
