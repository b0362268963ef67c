from dataclasses import replace

import pytest
import torch

from fedpress.core.examples import Arrays
from fedpress.errors import RecipeError
from fedpress.pipeline import recipe as recipes
from fedpress.pipeline.check import check_recipe
from fedpress.pipeline.start import load_data
from fedpress.stages.federate.rehearsal import trial_examples
from tests.harness import checked
from tests.stages.own_data import Embeds, privacy, recipe

TRUSTS = ("local", "distributed", "central")
CASES = [(unit, trust) for unit in ("sample", "client") for trust in TRUSTS]


@pytest.mark.parametrize(("unit", "trust"), CASES)
def test_check_takes_one_step_and_lets_what_works_pass(unit, trust):
    assert checked(recipe(stage=privacy(unit, trust)))[0]["epsilon"] > 0


@pytest.mark.parametrize(("unit", "trust"), CASES)
def test_check_refuses_what_fails_with_the_cause_before_epsilon_is_spent(unit, trust):
    words = (
        r"a private step fails on public examples of shape \[6\] .*this network was never trained; "
        r"change the model so that it runs on single examples \(no epsilon was spent\)$"
    )
    with pytest.raises(RecipeError, match=words):
        checked(recipe(model="Breaks", stage=privacy(unit, trust)))


@pytest.mark.parametrize("trust", TRUSTS)
def test_check_refuses_a_buffer_that_changes_and_a_network_without_a_gradient(trust):
    with pytest.raises(RecipeError, match=r"model\.passes: this buffer changed"):
        checked(recipe(model="Remembers", stage=privacy("sample", trust)))
    with pytest.raises(RecipeError, match="does not require grad"):
        checked(recipe(model="Idle", stage=privacy("sample", trust) + '\ntrainable = ["head.*"]'))


def test_without_privacy_nothing_is_rehearsed():
    assert checked(recipe(model="Breaks"))


def test_without_rounds_nothing_is_rehearsed():
    assert checked(recipe(model="Breaks", stage=privacy("sample", "local"), rounds=0))


def without_public(text, **parts):
    loaded = recipes.load(text, ())
    data = load_data(loaded)
    none = Arrays(data.public.x[:0], data.public.y[:0])
    unowned = replace(data, test_owners=None, test_owner_names=())
    return loaded, replace(unowned, public=none, validation=none, test=none, **parts)


def public_of(data):
    return data.public, data.validation, data.test


@pytest.mark.parametrize("trust", TRUSTS)
def test_made_up_tokens_stay_below_the_vocabulary(trust):
    loaded, data = without_public(recipe(stage=privacy("sample", trust)))
    assert check_recipe(loaded, data)[0]["epsilon"] > 0
    for what, arrays in trial_examples(data.clients["c2"], public_of(data), data.task, Embeds()):
        assert what == "made-up"
        if bool((arrays.x == arrays.x.round()).all()):
            assert 0 <= int(arrays.x.min()) <= int(arrays.x.max()) < 10


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_made_up_examples_have_the_shape_and_type_of_the_clients(dtype):
    data = without_public(recipe())[1]
    like = Arrays(torch.zeros(3, 2, 4, 4).to(dtype), torch.zeros(3, dtype=torch.int64))
    made = list(trial_examples(like, public_of(data), data.task, torch.nn.Flatten()))
    assert made
    for _, arrays in made:
        assert arrays.x.shape[1:] == (2, 4, 4)
        assert arrays.x.dtype == dtype
        assert len(arrays) >= 2


def test_the_cure_for_made_up_examples_names_public_ones():
    loaded, data = without_public(recipe(model="Breaks", stage=privacy("sample", "local")))
    with pytest.raises(RecipeError, match=r"made-up examples .*data\.public_share"):
        check_recipe(loaded, data)
