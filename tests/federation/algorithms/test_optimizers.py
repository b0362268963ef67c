import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from fedpress.federation.algorithms.optimizers import SERVERS, Adam, Average, Momentum, Server

G = torch.Generator().manual_seed(0)
UPDATES = [torch.randn(50, generator=G) for _ in range(6)]
START = torch.randn(50, generator=G)


def after(server, updates=UPDATES, params=START):
    state = server.init(params)
    for u in updates:
        state, params = server.step(state, params, u)
    return params


def test_average_adds_the_updates():
    assert torch.allclose(after(Average(lr=0.5)), START + 0.5 * sum(UPDATES), atol=1e-6)


def test_momentum_equals_its_closed_form():
    beta, n = 0.8, len(UPDATES)
    weights = [sum(beta**k for k in range(n - i)) for i in range(n)]
    expected = START.double() + 0.3 * sum(
        w * u.double() for w, u in zip(weights, UPDATES, strict=True)
    )
    assert torch.allclose(after(Momentum(lr=0.3, beta=beta)).double(), expected, atol=1e-5)


def test_momentum_equals_torch_sgd_on_the_negated_update():
    p = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([p], lr=0.3, momentum=0.8)
    for u in UPDATES:
        p.grad = -u
        optimizer.step()
    assert torch.allclose(after(Momentum(lr=0.3, beta=0.8)), p.detach(), atol=1e-5)


def test_adam_equals_algorithm_2_of_its_paper():
    lr, b1, b2, tau = 0.1, 0.9, 0.99, 1e-3
    x, n = START.double(), len(UPDATES)
    for t in range(1, n + 1):
        m = sum((1 - b1) * b1 ** (t - 1 - i) * UPDATES[i].double() for i in range(t))
        v = b2**t * tau**2 + sum(
            (1 - b2) * b2 ** (t - 1 - i) * UPDATES[i].double() ** 2 for i in range(t)
        )
        x = x + lr * m / (v.sqrt() + tau)
    assert torch.allclose(after(Adam(lr=lr, beta1=b1, beta2=b2, tau=tau)).double(), x, atol=1e-5)


@pytest.mark.parametrize("kind", SERVERS)
def test_every_server_is_pure_and_keeps_float32(kind):
    server, params, u = SERVERS[kind](), START.clone(), UPDATES[0].clone()
    state = server.init(params)
    kept = {name: t.clone() for name, t in state.items()}
    new_state, new = server.step(state, params, u)
    assert torch.equal(params, START)
    assert torch.equal(u, UPDATES[0])
    assert all(torch.equal(state[name], t) for name, t in kept.items())
    assert new.dtype == torch.float32
    assert all(t.dtype == torch.float32 and t.shape == params.shape for t in new_state.values())


@pytest.mark.parametrize("kind", SERVERS)
def test_a_zero_update_at_rest_changes_nothing(kind):
    assert torch.equal(after(SERVERS[kind](), [torch.zeros(50)] * 2), START)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_server_is_chosen_by_its_kind_in_a_recipe(kind):
    assert TypeAdapter(Server).validate_python({"kind": kind}) == SERVERS[kind]()


@pytest.mark.parametrize(
    "bad", [{"kind": "adam", "lr": 0}, {"kind": "momentum", "beta": 1}, {"kind": "adam", "beta": 1}]
)
def test_settings_out_of_range_or_unknown_are_refused(bad):
    with pytest.raises(ValidationError):
        TypeAdapter(Server).validate_python(bad)
