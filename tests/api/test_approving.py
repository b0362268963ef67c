"""Approving a recipe: without its data, and as it will be offered."""

import pytest

from fedpress.api.approving import approve, asked_for
from fedpress.errors import RecipeError
from fedpress.network.ledger import OwnerLedger, default_path

RECIPE = {
    "data": {"source": "csv", "path": "nowhere.csv", "label_column": "ill"},
    "model": {"architecture": "mlp", "arguments": {"in_features": 4}},
    "stage": [{"kind": "train", "epochs": 1}, {"kind": "federate"}],
}


def test_no_data_are_needed_and_the_words_name_what_is_predicted():
    (found,) = asked_for(RECIPE)
    assert found.stage == "federate"
    assert "Predicts the columns ill." in found.words


def test_each_federate_stage_is_approved_by_its_own_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    second = {"kind": "federate", "name": "again", "num_rounds": 3}
    found = approve({**RECIPE, "stage": [*RECIPE["stage"], second]})
    assert [one.stage for one in found] == ["federate", "again"]
    ledger = OwnerLedger(default_path())
    assert all(ledger.approved(one.fingerprint) for one in found)
    approve({**RECIPE, "stage": [second]}, withdraw=True)
    assert [ledger.approved(one.fingerprint) for one in found] == [True, False]


@pytest.mark.parametrize(
    ("key", "same"),
    [
        ("data.path=other.csv", True),
        ("seed=5", True),
        ("data.label_column=age", False),
        # Sizes follow from the data, so an offer has them where the recipe has none.
        ("model.arguments.in_features=5", True),
        ("model.arguments.num_classes=2", True),
        ("model.arguments.hidden=[3]", False),
        ("stage.federate.lr=0.5", False),
        ('stage.federate.delays={kind = "constant"}', True),
    ],
)
def test_the_fingerprint_follows_from_the_terms_alone(key, same):
    other = asked_for(RECIPE, [key])[0].fingerprint
    assert (other == asked_for(RECIPE)[0].fingerprint) is same


def test_a_recipe_that_asks_clients_for_nothing_is_refused():
    with pytest.raises(RecipeError, match=r"no stage asks clients.*kind"):
        asked_for({**RECIPE, "stage": [{"kind": "train", "epochs": 1}]})
