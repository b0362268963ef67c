"""Texts of one's own become the sequences that the training would have made of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fedpress
from fedpress.data.labelled_texts import labelled_texts
from fedpress.errors import DataError, FedpressError
from fedpress.network.data import ClientData
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.start import first_state, load_data
from fedpress.stages.federate.deployed import offer_of
from fedpress.stages.federate.offer import Offer
from tests.harness import finish
from tests.stages.statistics.texts import LETTERS, TRAINING, written

LISTED = f"classes = {list(LETTERS[:6])}"


def public(folder, keys: str = LISTED) -> str:
    return written(folder, keys).replace('statistics = "private"', "")


@pytest.mark.parametrize("keys", [LISTED, LISTED + '\nunknown = "other"'])
def test_equal_texts_give_equal_sequences(tmp_path, keys):
    text = public(tmp_path / "texts", keys + '\ntest_clients = ["c1"]') + TRAINING
    recipe = recipes.load(text)
    data = load_data(recipe)
    found, _ = labelled_texts(
        tmp_path / "texts" / "c1.txt", data.preparation, recipe.data, data.task
    )
    assert torch.equal(found.x, data.test.x)
    assert torch.equal(found.y, data.test.y)
    state = first_state(recipe, data)
    network = SimpleNamespace(labels=recipe.data.label_columns, reading=recipe.data.reading)
    offer = offer_of(recipe.stage[0], state, network).to_message({"stage": "federate"})
    own = ClientData(tmp_path / "texts" / "c1.txt").arrays(Offer.from_message(offer))
    assert torch.equal(own.x, data.test.x)
    assert torch.equal(own.y, data.test.y)


def test_a_folder_has_the_sequences_of_all_its_texts(tmp_path):
    recipe = recipes.load(public(tmp_path / "texts") + TRAINING)
    data = load_data(recipe)
    whole, _ = labelled_texts(tmp_path / "texts", data.preparation, recipe.data, data.task)
    each = [
        labelled_texts(path, data.preparation, recipe.data, data.task)[0].x
        for path in sorted((tmp_path / "texts").iterdir())
    ]
    assert torch.equal(whole.x, torch.cat(each))


@pytest.mark.parametrize(
    ("content", "message"),
    [("?!" * 9, "no sequence has two tokens"), ("e", "fewer than two tokens")],
)
def test_texts_that_teach_nothing_are_refused(tmp_path, content, message):
    recipe = recipes.load(public(tmp_path / "texts") + TRAINING)
    data = load_data(recipe)
    (tmp_path / "own.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        labelled_texts(tmp_path / "own.txt", data.preparation, recipe.data, data.task)


@pytest.mark.recipe
def test_eval_of_another_text_measures_its_tokens(tmp_path):
    text = public(tmp_path / "texts", LISTED + '\ntest_clients = ["c1"]') + TRAINING
    finish(text, tmp_path / "run")
    wanted = fedpress.evaluate(tmp_path / "run")
    found = fedpress.evaluate(tmp_path / "run", path=tmp_path / "texts" / "c1.txt")
    assert found["tokens"] == wanted["tokens"]
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    (tmp_path / "new.csv").write_text("a\n1\n")
    with pytest.raises(FedpressError, match=r"not trained on \.csv data"):
        fedpress.evaluate(tmp_path / "run", path=tmp_path / "new.csv")
