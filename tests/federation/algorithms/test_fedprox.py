import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.core import parameters
from fedpress.errors import DivergedError
from fedpress.federation import FedProx
from tests.federation.federation import Federation, LocalSettings, examples, mlp
from tests.federation.test_local import task


def test_the_proximal_pull_equals_its_penalty_in_the_loss():
    mu, model = 0.7, mlp()
    twin, start = copy.deepcopy(model), parameters.flatten(model)
    work = task(epochs=3, batch_size=10, lr=0.2)
    vectors, _, _ = FedProx(proximal_mu=mu).client_update(model, work, {}, {})
    for _ in range(3):
        flat = torch.cat([p.reshape(-1) for p in twin.parameters()])
        loss = (
            F.cross_entropy(twin(examples(10).x), examples(10).y)
            + mu / 2 * (flat - start).square().sum()
        )
        grads = torch.autograd.grad(loss, list(twin.parameters()))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), grads, strict=True):
                p -= 0.2 * g
    assert torch.allclose(parameters.flatten(model), parameters.flatten(twin), atol=1e-6)
    assert torch.equal(vectors["update"], parameters.flatten(model) - start)


def test_a_parameter_that_the_loss_does_not_reach_stays_under_the_pull_too():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Spare()
    before = model.spare.weight.clone()
    FedProx(proximal_mu=0.1).client_update(model, task(weight_decay=0.1), {}, {})
    assert torch.equal(model.spare.weight, before)


def test_a_pull_that_overshoots_is_named_where_training_diverges():
    settings = LocalSettings(batch_size=4, lr=0.5, epochs=5)
    federation = Federation(settings=settings, algorithm=FedProx(proximal_mu=1e30))
    with pytest.raises(DivergedError, match=r"proximal_mu \(now 1e\+30\)"):
        federation.clients["c0"].answer(federation.fit())
