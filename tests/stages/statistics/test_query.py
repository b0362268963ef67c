"""What a query asks of each row, and what follows from its sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedpress.core.examples import MISSING
from fedpress.data.preparation import InputColumn, Preparation
from fedpress.models.column_sums import ColumnSums, Number
from fedpress.privacy.per_example.gradients import clipped_gradient_sum
from fedpress.stages.statistics.query import Query, quantile
from fedpress.stages.statistics.settings import BINS, StatisticsSettings
from fedpress.tasks import ColumnSums as SumsTask

PRIVACY = {"unit": "sample", "epsilon": 1.0}
BOUNDS = {"age": (0.0, 110.0), "income": (-1e5, 3e5)}


def query(gaps=False, **keys) -> Query:
    def column(name, kind, words=(), **how):
        width = max(1, len(words))
        return InputColumn(name, kind, words, fill=(MISSING,) * width if gaps else (), **how)

    jobs = ("cook", "nurse", "clerk", "other")
    about = Preparation(
        (
            column("age", "number"),
            column("job", "words", jobs, unknown="other"),
            column("income", "number"),
            column("smokes", "truth"),
        )
    )
    given = {"kind": "statistics", "bounds": BOUNDS, "privacy": PRIVACY, **keys}
    return Query(StatisticsSettings.model_validate(given), about)


def network(asked: Query) -> ColumnSums:
    tables = {
        key: tuple(map(tuple, value)) if isinstance(value, list) else value
        for key, value in asked.arguments.items()
    }
    return ColumnSums(**tables)


def table(n: int, *, gaps=False, wild=False, seed=0) -> torch.Tensor:
    """Rows of age, job (four words), income, smokes."""
    chance = torch.Generator().manual_seed(seed)
    age = 50 + 12 * torch.randn(n, 1, generator=chance)
    income = 45_000 + 9_000 * torch.randn(n, 1, generator=chance)
    job = torch.tensor([5.0, 3.0, 1.0, 0.2]).multinomial(n, True, generator=chance)
    smokes = torch.rand(n, 1, generator=chance).round()
    if wild:
        age, income = age * 1e6, income * -1e30
    x = torch.cat([age, torch.nn.functional.one_hot(job, 4).float(), income, smokes], dim=1)
    if gaps:
        for first, last in ((0, 1), (1, 5), (5, 6), (6, 7)):
            empty = torch.rand(n, generator=chance) < 0.2
            x[empty, first:last] = MISSING
    return x


SHAPES = [
    (gaps, method, words)
    for gaps in (False, True)
    for method in ("moments", "quantiles")
    for words in ({}, {"job": 2})
]


@pytest.mark.parametrize(("gaps", "method", "words"), SHAPES)
def test_no_row_adds_more_than_the_sensitivity(gaps, method, words):
    private = {**PRIVACY, "trust": "central"} if method == "moments" else PRIVACY
    sums = network(query(gaps, method=method, words=words, privacy=private))
    for seed, wild in ((0, False), (1, True)):
        each = sums.phi(table(500, gaps=gaps, wild=wild, seed=seed)).double().norm(dim=1)
        assert float(each.max()) <= sums.norm * (1 + 1e-6)
    # A row at the upper bounds adds exactly that much, so the noise is not larger than needed.
    extreme = torch.tensor([[110.0, 1.0, 0.0, 0.0, 0.0, 3e5, 1.0]])
    assert float(sums.phi(extreme).norm()) == pytest.approx(sums.norm, rel=1e-6)


@pytest.mark.parametrize(("gaps", "method", "words"), SHAPES)
def test_one_row_more_moves_the_clipped_gradients_by_at_most_the_sensitivity(gaps, method, words):
    sums = network(query(gaps, method=method, words=words))
    task = SumsTask(("a", "b"))
    x = table(30, gaps=gaps, wild=True)
    y = torch.zeros(30, dtype=torch.int64)
    totals = [
        clipped_gradient_sum(sums, task.loss, x[:n], y[:n], clip_norm=sums.norm)[0]
        for n in (29, 30)
    ]
    assert float((totals[1] - totals[0]).norm()) <= sums.norm
    # The gradient is minus what the rows add.
    assert torch.allclose(totals[1], -sums.phi(x).sum(0), rtol=1e-4, atol=1e-3)


def test_without_noise_the_moments_are_those_of_the_clipped_rows():
    asked = query()
    x = table(2000)
    found = asked.answer(network(asked), network(asked).phi(x).double().mean(0), 0.0)
    for name, at in (("age", 0), ("income", 5)):
        values = x[:, at].double().numpy().clip(*BOUNDS[name])
        told = found.columns[name]
        assert told["mean"] == pytest.approx(values.mean(), rel=1e-4)
        assert told["std"] == pytest.approx(values.std(), rel=1e-3)
    assert not found.warning
    about = found.preparation
    assert about.mean[0] == found.columns["age"]["mean"]
    # Words and truth values keep their scale.
    assert about.mean[1:5] == (0.0,) * 4
    assert about.std[1:5] == (1.0,) * 4


@pytest.mark.parametrize("gaps", [False, True])
def test_clients_that_do_not_answer_bias_no_mean(gaps):
    # The sums of half of the rows, divided by the number of all.
    asked = query(gaps, privacy={**PRIVACY, "trust": "central"})
    sums = network(asked)
    x = table(2000, gaps=gaps)
    found = asked.answer(sums, sums.phi(x).double().mean(0) / 2, 0.0)
    expected = asked.answer(sums, sums.phi(x).double().mean(0), 0.0)
    assert found.columns["age"]["mean"] == pytest.approx(expected.columns["age"]["mean"])
    assert found.preparation.std == pytest.approx(expected.preparation.std)


def test_without_noise_gaps_are_filled_with_the_means_of_the_other_rows():
    asked = query(gaps=True, words={"job": 2})
    x = table(2000, gaps=True)
    found = asked.answer(network(asked), network(asked).phi(x).double().mean(0), 0.0)
    age, job, _, smokes = found.preparation.columns
    known = x[x[:, 0] != MISSING, 0].double().clamp(0, 110)
    assert age.fill == (pytest.approx(float(known.mean()), rel=1e-4),)
    shares = x[x[:, 1] != MISSING, 1:5].mean(0)
    assert job.words == ("cook", "nurse", "other")
    assert job.fill == pytest.approx(shares[[0, 1, 3]].tolist(), abs=1e-5)
    assert smokes.fill == (pytest.approx(float(x[x[:, 6] != MISSING, 6].mean()), abs=1e-5),)
    assert len(found.preparation.mean) == found.preparation.width == 6


def test_without_noise_quantiles_are_right_to_a_bin():
    asked = query(method="quantiles")
    x = table(4000)
    found = asked.answer(network(asked), network(asked).phi(x).double().mean(0), 0.0)
    for name, at in (("age", 0), ("income", 5)):
        values = x[:, at].double().numpy().clip(*BOUNDS[name])
        low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
        told = found.columns[name]
        width = (BOUNDS[name][1] - BOUNDS[name][0]) / BINS
        assert told["median"] == pytest.approx(median, abs=width)
        assert told["quartiles"] == pytest.approx([low, high], abs=width)
        spread = found.preparation.std[at]
        assert spread == pytest.approx(max((high - low) / 1.349, width), abs=1.5 * width)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.5, 0.77, 1.0])
def test_quantiles_of_noise_lie_between_the_bounds(q):
    column = Number(0, -2.0, 6.0, BINS)
    chance = np.random.default_rng(1)
    for _ in range(50):
        counts = chance.normal(size=column.width).tolist()
        assert -2.0 <= quantile(q, counts, column) <= 6.0
    assert -2.0 <= quantile(q, [0.0] * column.width, column) <= 6.0


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("method", ["moments", "quantiles"])
def test_any_noise_gives_usable_statistics(gaps, method):
    asked = query(gaps, method=method, words={"job": 2})
    sums = network(asked)
    chance = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.1, 1.0, 100.0):
        means = scale * torch.randn(sums.sums.in_features, generator=chance)
        about = asked.answer(sums, means, scale).preparation
        assert all(0 < std < float("inf") for std in about.std)
        assert 0 <= about.mean[0] <= 110
        assert Preparation.from_json(about.to_json()) == about


def test_words_that_the_noise_may_have_chosen_are_counted():
    asked = query(words={"job": 3})
    sums = network(asked)
    means = sums.phi(table(1000)).double().mean(0)
    assert not asked.answer(sums, means, 1e-4).chosen_by_noise
    # A word of three that half of the rows, a third and a tenth have.
    found = asked.answer(sums, means, 0.15)
    assert found.chosen_by_noise == {"job": (1, 3)}
    assert "the noise alone may have chosen 1 of the 3 words of 'job'" in found.warning


def test_columns_that_drown_in_noise_are_named():
    asked = query()
    sums = network(asked)
    x = table(1000)
    means = sums.phi(x).double().mean(0)
    assert "hides the standard deviation of 'income'" in asked.answer(sums, means, 0.01).warning
    said = asked.answer(sums, means, 2.0).warning
    assert said.startswith("the noise moves the mean of 'age', 'income' by more than")
