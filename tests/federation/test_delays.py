import math

import pytest
import torch
from pydantic import TypeAdapter

from fedpress.federation.delays import DELAYS, AnyDelays, Constant, Exponential, Lognormal

ROWS = [Constant(seconds=3.0), Lognormal(median=2.0), Exponential(mean=4.0)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.kind)
def test_a_delay_follows_from_seed_client_and_task_alone(row):
    asked = [(seed, client, task) for seed in (1, 2) for client in "ab" for task in (1, 2)]
    forwards = [row.draw(*one) for one in asked]
    backwards = [row.draw(*one) for one in reversed(asked)]
    assert forwards == backwards[::-1]
    assert all(math.isfinite(delay) and delay >= 0 for delay in forwards)
    assert len(set(forwards)) == (1 if row.kind == "constant" else len(asked))


@pytest.mark.recipe
def test_lognormal_delays_have_the_spread_of_devices_and_of_tasks():
    row = Lognormal(median=5.0, devices=0.8, tasks=0.2)
    clients = [f"c{i}" for i in range(1000)]
    logs = torch.tensor([[row.draw(1, name, task) for task in range(8)] for name in clients]).log()
    assert logs.mean().exp().item() == pytest.approx(5.0, rel=0.1)
    assert logs.std(1).pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.05)
    between = logs.mean(1).var().item() - 0.2**2 / 8
    assert math.sqrt(between) == pytest.approx(0.8, rel=0.1)


def test_exponential_delays_have_mean_and_median():
    row = Exponential(mean=3.0)
    delays = torch.tensor([row.draw(1, "a", task) for task in range(4000)])
    assert delays.mean().item() == pytest.approx(3.0, rel=0.06)
    assert delays.median().item() == pytest.approx(3.0 * math.log(2), rel=0.08)


def test_the_table_names_every_row():
    adapter = TypeAdapter(AnyDelays)
    for kind, row in DELAYS.items():
        assert isinstance(adapter.validate_python({"kind": kind}), row)
