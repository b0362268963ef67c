import json
import time

import pytest

from fedpress.errors import PrivacyError, RecipeError
from fedpress.privacy.accounting.accountant import GaussianEvent, epsilon
from fedpress.privacy.ledger import Ledger, LedgerEntry


def round_of(names, number, *, steps=10, q=0.1, noise=2.0):
    return [LedgerEntry(name, "federate", q, noise, steps, number, number) for name in names]


def test_rounds_of_many_clients_cost_what_one_client_was_charged():
    book = Ledger("sample")
    for number in range(1, 6):
        book = book.add(*round_of(["a", "b", "c"], number))
    assert book.epsilon(delta=1e-5) == epsilon([GaussianEvent(0.1, 2.0, 50)], delta=1e-5)
    assert [(c.who, c.steps, c.first_round, c.last_round) for c in book.entries] == [
        (who, 50, 1, 5) for who in "abc"
    ]


def test_the_party_that_was_charged_most_decides_and_the_population_counts_for_all():
    book = Ledger("sample").add(*round_of("ab", 1), *round_of("b", 2, steps=100))
    assert book.epsilon(delta=1e-5) == epsilon([GaussianEvent(0.1, 2.0, 110)], delta=1e-5)
    book = book.add(LedgerEntry("population", "prune", 1.0, 50.0, 1))
    assert book.epsilon(delta=1e-5) == epsilon(
        [GaussianEvent(0.1, 2.0, 110), GaussianEvent(1.0, 50.0, 1)], delta=1e-5
    )


def test_parties_that_no_other_covers_are_all_asked():
    book = Ledger("sample").add(
        LedgerEntry("a", "x", 0.5, 2.0, 10), LedgerEntry("b", "x", 0.1, 2.0, 500)
    )
    parts = [
        epsilon([GaussianEvent(0.5, 2.0, 10)], delta=1e-5),
        epsilon([GaussianEvent(0.1, 2.0, 500)], delta=1e-5),
    ]
    assert book.epsilon(delta=1e-5) == max(parts)


def test_stages_compose_by_the_accountant_and_not_by_addition():
    one, two = LedgerEntry("c", "federate", 0.1, 2.0, 100), LedgerEntry("c", "distil", 0.2, 3.0, 50)
    parts = [Ledger("sample").add(c).epsilon(delta=1e-5) for c in (one, two)]
    both = Ledger("sample").add(one, two).epsilon(delta=1e-5)
    assert max(parts) < both < 0.95 * sum(parts)


def test_json_keeps_all_that_is_needed_to_recompute():
    book = Ledger("sample").add(
        *round_of("ab", 1), LedgerEntry("a", "calibrate", 1.0, 9.5, 1), *round_of("a", 2)
    )
    again = Ledger.from_json(book.to_json())
    assert again == book
    assert len(again.entries) == 4
    assert again.epsilon(delta=1e-5) == book.epsilon(delta=1e-5)
    by_hand = [
        GaussianEvent(c["sampling_prob"], c["noise_multiplier"], c["steps"])
        for c in json.loads(book.to_json())["charges"]
        if c["who"] == "a"
    ]
    assert epsilon(by_hand, delta=1e-5) == book.epsilon(delta=1e-5)


def test_a_charge_that_would_pass_the_budget_is_refused_before_it_is_made():
    book = Ledger("sample")
    fits = 0
    while not book.would_exceed(*round_of("ab", fits + 1), epsilon=1.5, delta=1e-5):
        fits += 1
        book = book.spend(*round_of("ab", fits), epsilon=1.5, delta=1e-5)
    assert fits > 1
    before = book
    with pytest.raises(PrivacyError, match=r"beyond the budget 1\.5"):
        book.spend(*round_of("ab", fits + 1), epsilon=1.5, delta=1e-5)
    assert book == before
    assert book.epsilon(delta=1e-5) <= 1.5


def test_a_resumed_book_does_not_start_its_budget_again():
    book = Ledger("client").add(LedgerEntry("population", "federate", 1.0, 5.0, 30))
    resumed = Ledger.from_json(book.to_json()).add(
        LedgerEntry("population", "federate", 1.0, 5.0, 20)
    )
    assert resumed.epsilon(delta=1e-3) == pytest.approx(4.8453, rel=1e-3)
    assert len(resumed.entries) == 1


CHARGE = '{"who": "a", "what": "b", "sampling_prob": 2, "noise_multiplier": 1, "steps": 1}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"version": 9}',
        '{"version": 1, "unit": "sample"}',
        '{"version": 1, "unit": "moon", "charges": []}',
        '{"version": 1, "unit": "sample", "charges": [{"who": "a"}]}',
        f'{{"version": 1, "unit": "sample", "charges": [{CHARGE}]}}',
    ],
)
def test_a_damaged_book_is_a_privacy_error(text):
    with pytest.raises(PrivacyError, match="ledger"):
        Ledger.from_json(text)


def test_an_empty_book_has_spent_nothing_and_an_unknown_unit_is_refused():
    assert Ledger("sample").epsilon(delta=1e-5) == 0
    with pytest.raises(RecipeError, match="unit"):
        Ledger("image")


def test_a_curve_over_rounds_is_cheap_even_for_unequal_clients():
    book = Ledger("sample").add(*round_of("a", 0))
    book.epsilon(delta=1e-5)  # imports
    start = time.process_time()
    for number in range(1, 6):
        book = book.add(
            *[c for i in range(20) for c in round_of([f"c{i}"], number, q=0.1 + 0.001 * i)]
        )
        book.epsilon(delta=1e-5)
    assert (
        time.process_time() - start < 6
    )  # well under 1 s on an idle core; composing every round anew takes longer
