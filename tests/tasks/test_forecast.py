"""Forecasts: metrics by horizon, and the skill against the last observed value."""

import pytest
import torch

from fedpress import tasks
from fedpress.errors import DataError
from fedpress.tasks import Forecast, merged

NAMES = ("now", "t+1", "t+6", "t+24")


def series(n, seed=0):
    """Returns targets [n, 4] of a random walk, the first column being the value now."""
    steps = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return 50 + 3 * steps.cumsum(1)


def test_metrics_are_those_of_sklearn_by_horizon_and_together():
    metrics = pytest.importorskip("sklearn.metrics")
    targets = series(200)
    task = Forecast.fit(NAMES, targets[:100])
    outputs = torch.randn(200, 3)
    found = task.summary(merged(*(task.metrics(outputs[a::3], targets[a::3]) for a in range(3))))
    wanted, predicted = targets[:, 1:].double(), task.to_targets(outputs.double())
    mae = metrics.mean_absolute_error(wanted, predicted, multioutput="raw_values")
    squared = metrics.mean_squared_error(wanted, predicted, multioutput="raw_values")
    assert found["mae_by_horizon"] == pytest.approx(mae)
    assert found["rmse_by_horizon"] == pytest.approx(squared**0.5)
    assert found["mae"] == pytest.approx(mae.mean())
    assert found["rmse"] == pytest.approx(squared.mean() ** 0.5)
    same = targets[:, :1].double().expand(200, 3)
    of_same = metrics.mean_absolute_error(wanted, same, multioutput="raw_values")
    assert found["mae_of_persistence"] == pytest.approx(of_same.mean())
    assert found["skill"] == pytest.approx(1 - mae.mean() / of_same.mean())
    assert found["skill_by_horizon"] == pytest.approx(1 - mae / of_same)


def test_persistence_itself_has_no_skill_and_is_warned_of():
    targets = series(50)
    task = Forecast(NAMES[1:], now=True)
    found = task.summary(task.metrics(targets[:, :1].expand(50, 3), targets))
    assert found["skill"] == 0
    assert "no better than always answering the last observed value" in found["mae_warning"]
    perfect = task.summary(task.metrics(targets[:, 1:], targets))
    assert (perfect["skill"], perfect["mae"], perfect["mae_warning"]) == (1, 0, None)


def test_without_the_last_value_there_is_no_skill_and_it_says_how_to_get_one():
    targets = series(50)[:, 1:]
    task = tasks.make("forecast", NAMES[1:], targets)
    found = task.summary(task.metrics(torch.zeros(50, 3), targets))
    assert found["mae"] is not None
    for key in ("skill", "mae_of_persistence", "skill_by_horizon"):
        assert found[key] is None
    assert "now = true" in found["skill_note"]
    # What the sentence advises works.
    cured = tasks.make({"kind": "forecast", "now": True}, ("pm25", *NAMES[1:]), series(50))
    again = cured.summary(cured.metrics(torch.zeros(50, 3), series(50)))
    assert again["skill"] is not None
    assert again["skill_note"] is None
    assert again["mae"] == pytest.approx(found["mae"])


def test_the_value_now_changes_neither_loss_nor_scale():
    targets = series(60)
    plain = tasks.make("forecast", NAMES[1:], targets[:, 1:])
    task = tasks.make("forecast", NAMES, targets)
    assert (task.names, task.mean, task.std) == (plain.names, plain.mean, plain.std)
    outputs = torch.randn(60, 3)
    torch.testing.assert_close(task.loss(outputs, targets), plain.loss(outputs, targets[:, 1:]))
    other = targets.clone()
    other[:, 0] = 1e9
    torch.testing.assert_close(task.loss(outputs, other), task.loss(outputs, targets))


def test_one_horizon_may_have_targets_of_one_column():
    task = tasks.make("forecast", ("tomorrow",), torch.randn(9))
    task.check(torch.zeros(4, 1), torch.randn(4))
    found = task.summary(task.metrics(torch.zeros(4, 1), torch.randn(4)))
    assert len(found["mae_by_horizon"]) == 1


def test_a_name_now_may_be_a_horizon_if_the_user_says_so():
    task = tasks.make({"kind": "forecast", "now": False}, ("now", "later"), torch.randn(9, 2))
    assert (task.names, task.now) == (("now", "later"), False)


def test_targets_of_the_value_now_alone_are_refused():
    with pytest.raises(DataError, match="no horizon"):
        tasks.make("forecast", ("now",), torch.randn(9, 1))


def test_a_series_that_never_changes_has_no_skill_to_tell():
    targets = torch.full((5, 4), 7.0)
    task = Forecast(NAMES[1:], now=True)
    found = task.summary(task.metrics(torch.zeros(5, 3), targets))
    assert found["skill"] is None
    assert found["mae_of_persistence"] == 0
