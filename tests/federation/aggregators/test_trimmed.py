import pytest
import torch

from fedpress.codecs import Key
from fedpress.federation.aggregators import centre
from fedpress.federation.aggregators.base import Contribution
from fedpress.federation.aggregators.centre import KeptUpdates
from fedpress.federation.aggregators.trimmed import Trimmed


def trim(rows, beta):
    gathering = KeptUpdates({"update": rows.shape[1]}, Trimmed(beta=beta).centre)
    for row in rows:
        gathering.add(Contribution(Key(1, 1, "c"), 1.0, {"update": row}))
    return gathering.close().vectors["update"]


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.25, 0.49])
@pytest.mark.parametrize("clients", [1, 2, 5, 10])
def test_each_coordinate_is_the_mean_of_its_middle_values(clients, beta):
    rows = torch.randn(clients, 20, generator=torch.Generator().manual_seed(clients))
    drop = int(beta * clients)
    expected = [
        sum(sorted(column)[drop : clients - drop]) / (clients - 2 * drop)
        for column in rows.double().T.tolist()
    ]
    assert trim(rows, beta).tolist() == pytest.approx(expected)


def test_blocks_do_not_show(monkeypatch):
    rows = torch.randn(5, 23, generator=torch.Generator().manual_seed(0))
    whole = trim(rows, 0.2)
    monkeypatch.setattr(centre, "BLOCK", 4)
    assert torch.equal(trim(rows, 0.2), whole)


@pytest.mark.parametrize("lie", [3e38, -3e38, 0.0])
def test_a_share_of_liars_leaves_every_coordinate_within_what_the_honest_sent(lie):
    honest = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).double()
    found = trim(torch.cat([honest.float(), torch.full((3, 40), lie)]), 0.3)
    assert bool(((found >= honest.amin(0)) & (found <= honest.amax(0))).all())


def test_nothing_that_came_is_zeros_without_weight():
    total = Trimmed().begin([], [], Key(1, 1, "s")).close()
    assert (total.vectors, total.weight) == ({}, 0.0)
    assert trim(torch.zeros(0, 3), 0.2).tolist() == [0.0] * 3
