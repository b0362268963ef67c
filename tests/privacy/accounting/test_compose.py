import json
import subprocess
import sys

import pytest

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.accountant import GaussianEvent, SkellamEvent
from fedpress.privacy.accounting.compose import epsilon
from fedpress.privacy.ledger import Ledger, LedgerEntry

GAUSSIAN = {"sampling_prob": 0.1, "noise_multiplier": 2.0, "steps": 30}
SKELLAM = {"kind": "skellam", "l2": 10.0, "l1": 100.0, "variance": 4e4, "steps": 5}


def test_a_list_of_phases_is_composed_by_the_accountant():
    expected = accountant.epsilon(
        [GaussianEvent(0.1, 2.0, 30), SkellamEvent(10.0, 100.0, 4e4, 5)], delta=1e-5
    )
    assert epsilon(json.dumps([GAUSSIAN | {"kind": "gaussian"}, SKELLAM]), delta=1e-5) == expected
    assert epsilon("[]", delta=1e-5) == 0


def test_a_ledger_is_read_as_it_is():
    book = Ledger("client").add(
        LedgerEntry("a", "x", 0.1, 2.0, 30),
        LedgerEntry.of("b", "x", SkellamEvent(10.0, 100.0, 4e4, 5)),
    )
    assert epsilon(book.to_json(), delta=1e-5) == book.epsilon(delta=1e-5)
    with pytest.raises(PrivacyError, match="ledger"):
        epsilon('{"charges": []}', delta=1e-5)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("{", "f.json: not JSON"),
        ("3", "f.json: got int, expected a list"),
        ("{}", "f.json: got dict, expected a list"),
        ("[3]", "f.json[0]: got 3, expected an object"),
        (
            json.dumps([GAUSSIAN | {"kind": "laplace"}]),
            "f.json[0].kind: got 'laplace', expected one of gaussian",
        ),
        (
            json.dumps([GAUSSIAN, GAUSSIAN | {"step": 3}]),
            "f.json[1].step: no such key; did you mean 'steps'?",
        ),
        (json.dumps([GAUSSIAN | {"steps": "3"}]), "f.json[0].steps: got '3', expected a number"),
        (json.dumps([GAUSSIAN | {"steps": True}]), "f.json[0].steps: got True"),
        (json.dumps([GAUSSIAN | {"sampling_prob": 2}]), "f.json[0].sampling_prob: got 2, expected"),
        (json.dumps([{"sampling_prob": 1, "steps": 2}]), "f.json[0].noise_multiplier: is missing"),
        (json.dumps([SKELLAM | {"variance": 0}]), "f.json[0].variance: got 0"),
    ],
)
def test_mistakes_are_named_with_their_place(page, words):
    with pytest.raises(RecipeError) as caught:
        epsilon(page, delta=1e-5, place="f.json")
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("page", ["[]", '{"charges": [], "version": 2, "unit": "sample"}'])
def test_delta_is_checked_first(page):
    with pytest.raises(RecipeError, match="delta: got"):
        epsilon(page, delta=2.0)


@pytest.mark.recipe
def test_questions_about_mixtures_and_bits_are_answered_without_torch():
    code = (
        "import sys; from fedpress.privacy import adaptive;"
        "from fedpress.privacy.accounting import compose;"
        "from fedpress.privacy.noise import distributed, factorization;"
        f"compose.epsilon({json.dumps([GAUSSIAN, SKELLAM])!r}, delta=1e-5);"
        "distributed.plan(size=9, clip_norm=1, coordinate_limit=1, clients=3, survivors=2, steps=2, delta=1e-5,"
        "epsilon=8);"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
