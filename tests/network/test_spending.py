"""What charges of either unit spend together, against closed forms."""

import math

import pytest

from fedpress.network.spending import Charge, spent
from fedpress.privacy.accounting import accountant
from fedpress.privacy.accounting.events import GaussianEvent, SkellamEvent
from fedpress.privacy.ledger import LedgerEntry

DELTA = 1e-5


def charge(unit, prob=1.0, noise=4.0, steps=10):
    return Charge(unit, LedgerEntry("owner", "federate", prob, noise, steps))


def epsilon(*events):
    return accountant.epsilon(events, delta=DELTA)


def test_charges_are_composed_and_not_added():
    together = spent([charge("sample"), charge("sample", noise=3.0)], unit="sample", delta=DELTA)
    assert together == epsilon(GaussianEvent(1.0, 4.0, 10), GaussianEvent(1.0, 3.0, 10))
    assert together < epsilon(GaussianEvent(1.0, 4.0, 10)) + epsilon(GaussianEvent(1.0, 3.0, 10))


def test_a_row_moves_a_clipped_update_twice_as_far_as_a_client():
    found = spent([charge("client"), charge("sample")], unit="sample", delta=DELTA)
    assert found == epsilon(GaussianEvent(1.0, 2.0, 10), GaussianEvent(1.0, 4.0, 10))


def test_a_skellam_entry_of_clients_counts_for_rows_with_twice_the_sensitivity():
    event = SkellamEvent(l2=10.0, l1=80.0, variance=1600.0, steps=3, failure=1e-9)
    found = spent(
        [Charge("client", LedgerEntry.of("c", "federate", event))], unit="sample", delta=DELTA
    )
    twice = SkellamEvent(l2=20.0, l1=160.0, variance=1600.0, steps=3, failure=2e-9)
    assert found == epsilon(twice)


def test_runs_that_draw_clients_are_bounded_by_group_privacy_where_that_is_less():
    drawn = charge("client", prob=0.1, noise=1.5, steps=20)
    of_clients = spent([drawn], unit="client", delta=DELTA)
    found = spent([drawn], unit="sample", delta=DELTA)
    assert 2 * of_clients < found < epsilon(GaussianEvent(1.0, 0.75, 20))
    half = found / 2
    less = DELTA / (1 + math.exp(half))
    assert accountant.epsilon([GaussianEvent(0.1, 1.5, 20)], delta=less) <= half


def test_rows_say_nothing_about_a_whole_client():
    assert spent([charge("client"), charge("sample")], unit="client", delta=DELTA) == math.inf


@pytest.mark.parametrize("unit", ["sample", "client"])
def test_a_run_without_privacy_has_spent_everything(unit):
    open_run = Charge(unit, LedgerEntry("owner", "federate", 1.0, 0.0, 1))
    assert spent([open_run], unit=unit, delta=DELTA) == math.inf


def test_nothing_spends_nothing():
    assert spent([], unit="sample", delta=DELTA) == 0.0
