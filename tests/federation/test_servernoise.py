import pytest
import torch

from fedpress.codecs import Key
from fedpress.federation.servernoise import ServerNoise
from fedpress.privacy.noise.factorization import Factorization
from fedpress.privacy.plan import PrivacyPlan

PLAN = PrivacyPlan("client", 0.5, 1.0, 2.0)
SHORT, LONG = (Factorization.plan(rounds, participations=1, bands=4) for rounds in (6, 60))


def draws(factors, total, kind):
    """The noise of the first round, in units of one fresh draw."""
    noise, key = ServerNoise(PLAN, factors), Key(1, 1, "server")
    if kind == "sum":
        return noise.add(total, {}, key)[0].double() - total
    return noise.count(total, {}, key, "hidden")[0].double() - total


@pytest.mark.parametrize("kind", ["sum", "counts"])
def test_plans_that_scale_a_draw_differently_never_share_it(kind):
    # Two answers T + a z and T + b z to the same sum T would give T = (b A - a B) / (b - a).
    total = torch.linspace(-1, 1, 20_000, dtype=torch.float64)
    found = torch.stack([draws(factors, total, kind) for factors in (None, SHORT, LONG)])
    apart = torch.corrcoef(found) - torch.eye(3, dtype=torch.float64)
    assert float(apart.abs().max()) < 0.03
    assert torch.equal(draws(SHORT, total, kind), draws(SHORT, total, kind))
