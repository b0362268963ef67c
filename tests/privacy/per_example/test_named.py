"""Per-example gradients of networks that take several inputs by name."""

import copy

import pytest
import torch

from fedpress.core.examples import Arrays
from fedpress.core.inputs import NamedInputs
from fedpress.privacy.noise.mechanism import poisson_batches
from fedpress.privacy.per_example.gradients import choose_method, clipped_gradient_sum
from fedpress.privacy.per_example.sgd import private_gradients
from fedpress.privacy.plan import PrivacyPlan
from fedpress.tasks import Classification
from tests.named import Notes, Packed, Sums, person

CLIP = 0.4
TASK = Classification(("no", "yes"))


def notes(n: int = 9) -> tuple[NamedInputs, torch.Tensor]:
    x, y = person(0, n)
    return NamedInputs({name: torch.as_tensor(x[name]) for name in x}), torch.as_tensor(y)


def pairs(n: int = 9) -> tuple[NamedInputs, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    x = {"left": torch.randn(n, 3, generator=chance), "right": torch.randn(n, 4, generator=chance)}
    return NamedInputs(x), torch.arange(n) % 2


CASES = [
    (Notes, notes, "loop"),
    (Notes, notes, "vmap"),
    (Packed, notes, "loop"),
    (Sums, pairs, "loop"),
    (Sums, pairs, "vmap"),
    (Sums, pairs, "ghost"),
]


def built(network) -> torch.nn.Module:
    torch.manual_seed(0)
    return network()


def plainly(model, x, y) -> torch.Tensor:
    """The plain loop: each example alone, its arguments written out."""
    total = torch.zeros(sum(p.numel() for p in model.parameters()))
    for i in range(len(y)):
        model.zero_grad()
        one = {name: x[name][i : i + 1] for name in x}
        torch.nn.functional.cross_entropy(model(**one), y[i : i + 1]).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        total += gradient * min(1.0, CLIP / float(gradient.norm()))
    return total


@pytest.mark.parametrize(("network", "examples", "method"), CASES)
def test_the_clipped_sum_is_that_of_single_examples(network, examples, method):
    model, (x, y) = built(network), examples()
    found, raw = clipped_gradient_sum(model, TASK.loss, x, y, clip_norm=CLIP, method=method)
    torch.testing.assert_close(found, plainly(copy.deepcopy(model), x, y), rtol=1e-4, atol=1e-5)
    assert raw.share_clipped > 0
    assert raw.agreed
    for gone in range(len(y)):
        kept = torch.arange(len(y)) != gone
        less, _ = clipped_gradient_sum(
            model, TASK.loss, x[kept], y[kept], clip_norm=CLIP, method=method
        )
        assert float((found - less).norm()) <= CLIP * (1 + 1e-4)


@pytest.mark.parametrize(("network", "examples", "method"), CASES)
def test_an_example_with_one_broken_input_contributes_nothing(network, examples, method):
    model, (x, y) = built(network), examples()
    whole, _ = clipped_gradient_sum(model, TASK.loss, x[1:], y[1:], clip_norm=CLIP)
    floats = next(name for name in x if x[name].is_floating_point())
    x[floats][0] = torch.nan
    found, raw = clipped_gradient_sum(
        model, TASK.loss, x, y, clip_norm=CLIP, method=method, verify="gradients"
    )
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert raw.refused == 1


@pytest.mark.parametrize(
    ("bad", "network"),
    [({"lengths": 0}, Packed), ({"tokens": 99}, Packed), ({"tokens": 99}, Notes)],
)
def test_an_example_on_which_the_network_raises_contributes_nothing(bad, network):
    model, (x, y) = built(network), notes()
    whole, _ = clipped_gradient_sum(model, TASK.loss, x[1:], y[1:], clip_norm=CLIP)
    for name, value in bad.items():
        x[name][0] = value
    method = choose_method(model, TASK.loss, x[1:], y[1:])
    found, raw = clipped_gradient_sum(
        model, TASK.loss, x, y, clip_norm=CLIP, method=method, verify="losses", tolerate_writes=True
    )
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert raw.failed == 1


@pytest.mark.parametrize(
    ("network", "examples", "expected"),
    [(Notes, notes, "vmap"), (Packed, notes, "loop"), (Sums, pairs, "ghost")],
)
def test_the_fastest_method_that_agrees_is_chosen(network, examples, expected):
    x, y = examples()
    assert choose_method(built(network), TASK.loss, x, y) == expected


def test_noised_steps_are_clipped_sums_of_drawn_examples():
    model, (x, y) = built(Notes), notes(40)
    plan = PrivacyPlan(
        unit="sample", clip_norm=CLIP, noise_multiplier=1e-6, sampling_prob=0.3,
        steps_per_round=3, delta=1e-3,
    )  # fmt: skip
    found = [
        gradient.clone()
        for gradient, _ in private_gradients(
            model, TASK.loss, x, y, plan=plan, steps=3,
            generator=torch.Generator().manual_seed(5),
        )
    ]  # fmt: skip
    first = next(iter(poisson_batches(40, 0.3, 3, torch.Generator().manual_seed(5))))
    drawn = Arrays(x, y).take(first)
    expected = plainly(copy.deepcopy(model), drawn.x, drawn.y) / (0.3 * 40)
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)
