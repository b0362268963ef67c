import numpy as np
import pytest
import torch

from fedpress.codecs import Key
from fedpress.federation.aggregators import centre
from fedpress.federation.aggregators.base import Contribution
from fedpress.federation.aggregators.centre import KeptUpdates
from fedpress.federation.aggregators.median import Median


def medians(rows):
    gathering = KeptUpdates({"update": rows.shape[1]}, Median().centre)
    for row in rows:
        gathering.add(Contribution(Key(1, 1, "c"), 1.0, {"update": row}))
    return gathering.close().vectors["update"]


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 9, 10])
def test_medians_are_those_of_numpy(clients):
    rows = torch.randn(clients, 50, generator=torch.Generator().manual_seed(clients))
    expected = np.median(rows.double().numpy(), axis=0)
    np.testing.assert_array_equal(medians(rows).numpy(), expected)


def test_blocks_do_not_show(monkeypatch):
    rows = torch.randn(5, 23, generator=torch.Generator().manual_seed(0))
    whole = medians(rows)
    monkeypatch.setattr(centre, "BLOCK", 4)
    assert torch.equal(medians(rows), whole)


def test_fewer_than_half_liars_leave_every_coordinate_within_what_the_honest_sent():
    honest = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for lie in (1e30, -1e30, 0.0):
        found = medians(torch.cat([honest, torch.full((4, 40), lie)]))
        assert bool((found >= honest.double().amin(0)).all())
        assert bool((found <= honest.double().amax(0)).all())


def test_the_middle_of_the_largest_floats_is_finite():
    assert medians(torch.full((2, 1), 3.4e38)).isfinite().all()


def test_nothing_that_came_is_zeros_without_weight():
    total = Median().begin([], [], Key(1, 1, "s")).close()
    assert (total.vectors, total.weight) == ({}, 0.0)
    total = KeptUpdates({"update": 3}, Median().centre).close()
    assert (total.vectors["update"].tolist(), total.weight) == ([0.0] * 3, 0.0)
