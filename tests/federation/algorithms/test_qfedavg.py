import pytest
import torch

from fedpress.errors import RecipeError
from fedpress.federation import FedAvg, LocalSettings
from fedpress.federation.algorithms import QFedAvg
from fedpress.privacy.plan import PrivacyPlan
from tests.federation.algorithms.quadratics import Quadratics


def twin(going, params, q, rate):
    """Algorithm 2 of the paper as it is written: L = 1 / rate, all clients."""
    deltas, curvatures = [], []
    for a, b in zip(going.a.double(), going.b.double(), strict=True):
        loss, w = float((a * (params - b).square()).sum() / 2), params.clone()
        for _ in range(going.settings.epochs):
            w = w - rate * a * (w - b)
        step = (params - w) / rate
        deltas.append(loss**q * step)
        curvatures.append(q * loss ** (q - 1) * step.square().sum() + loss**q / rate)
    return params - sum(deltas) / sum(curvatures)


def test_another_optimizer_than_sgd_is_refused_with_the_cure():
    with pytest.raises(RecipeError, match=r"optimizer: got 'adam', but 'qfedavg' .* set optimizer"):
        Quadratics(QFedAvg(), settings=LocalSettings(optimizer="adam"))


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_rounds_are_those_of_the_paper(q):
    going = Quadratics(QFedAvg(q=q))
    expected = going.params.double()
    for record in going.run(4):
        expected = twin(going, expected, q, going.settings.lr)
        torch.testing.assert_close(record.params.double(), expected, rtol=1e-4, atol=1e-5)


def test_without_q_it_is_fedavg():
    one, two = (Quadratics(row).run(4)[-1].params for row in (QFedAvg(q=0), FedAvg()))
    torch.testing.assert_close(one, two)


@pytest.mark.recipe
def test_a_larger_q_makes_losses_more_alike():
    def spread(q):
        going = Quadratics(QFedAvg(q=q))
        w = going.run(60)[-1].params
        return float((going.a * (w - going.b).square()).sum(1).var())

    assert spread(0.0) > spread(1.0) > spread(4.0)


def test_noise_on_the_curvature_divides_by_no_less_than_a_tenth_of_its_bound():
    row = QFedAvg(clip_norm=2.0)
    mean = {"update": torch.ones(3), "curvature": torch.tensor([-5.0])}
    _, moved = row.server_step({}, torch.zeros(3), mean, None)
    assert moved.tolist() == pytest.approx([5.0] * 3)
    going = Quadratics(row, privacy=PrivacyPlan("client", 1.0, 1.0, 1.0))
    assert torch.isfinite(going.run(3)[-1].params).all()
