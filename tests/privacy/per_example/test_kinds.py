import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.core.parameters import Layout, flatten, trainable
from fedpress.errors import RecipeError
from fedpress.privacy.per_example.gradients import choose_method, clipped_gradient_sum
from fedpress.privacy.per_example.sgd import private_steps
from fedpress.privacy.plan import PrivacyPlan
from tests.privacy.per_example.kinds import NUMBERS, WORDS, MixesRarely, Tokens, make


def by_hand(model, x, y, clip_norm):
    """The slow plain twin. A sample and its copy have the sample's mean loss, also for who takes no batch of one."""
    total = torch.zeros(Layout.of(model).size, dtype=torch.float64)
    for i in range(len(x)):
        twice = [i, i]
        loss = F.cross_entropy(model(x[twice]), y[twice])
        grads = torch.autograd.grad(loss, trainable(model), allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(trainable(model), grads, strict=True)
        ]
        flat = torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in dense]).double()
        total += flat * min(1.0, clip_norm / float(flat.norm()))
    return total.float()


@pytest.mark.parametrize("name", [*NUMBERS, *WORDS])
def test_gradients_of_every_kind_of_network_and_input_are_right(name):
    model, x, y = make(name)
    method = choose_method(model, F.cross_entropy, x, y)
    for verify in ("losses", "gradients"):
        got, raw = clipped_gradient_sum(
            model, F.cross_entropy, x, y, clip_norm=0.5, method=method, verify=verify
        )
        expected = by_hand(model, x, y, 0.5)
        assert (raw.failed, raw.refused, raw.problem) == (0, 0, "")
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())
        assert got.any()


@pytest.mark.parametrize("name", ["scale", "embedding", "tied", "raw", "rare"])
def test_networks_that_allow_it_get_a_fast_method(name):
    model, x, y = make(name)
    assert choose_method(model, F.cross_entropy, x, y) != "loop"


@pytest.mark.recipe
@pytest.mark.parametrize("name", ["scale", "embedding", "bag_sparse", "lstm", "squeezes", "unused"])
def test_private_steps_learn_with_every_kind(name):
    model, x, _ = make(name)
    x = x.repeat(20, 1)
    y = (x[:, 0] > x[:, 1]).long()
    plan = PrivacyPlan("sample", 1.0, 0.5, 0.05)
    before = F.cross_entropy(model(x), y).item()
    steps = private_steps(
        model,
        F.cross_entropy,
        x,
        y,
        plan=plan,
        steps=40,
        lr=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert all(record.raw.failed == 0 for record in steps)
    assert F.cross_entropy(model(x), y).item() < 0.8 * before


@pytest.mark.parametrize("verify", ["losses", "gradients"])
def test_a_network_that_mixes_examples_on_rare_inputs_falls_back_to_the_loop(verify):
    model, x, y = make("rare")
    x[3, 2] = 9.0
    method = choose_method(model, F.cross_entropy, x, y)
    assert method == "ghost"
    wrong, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5, method=method)
    got, raw = clipped_gradient_sum(
        model, F.cross_entropy, x, y, clip_norm=0.5, method=method, verify=verify
    )
    loop, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5)
    assert not torch.allclose(wrong, loop)
    assert torch.equal(got, loop)
    assert not raw.agreed


def test_a_rare_branch_that_the_fast_method_cannot_take_falls_back_to_the_loop():
    class Rare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return self.a(self.a(x).repeat(1, 2)) if bool((x > 4).any()) else self.a(x)

    model, (_, x, y) = Rare(), make("rare")
    assert choose_method(model, F.cross_entropy, x, y) == "ghost"
    x[0, 0] = 9.0
    got, raw = clipped_gradient_sum(
        model, F.cross_entropy, x, y, clip_norm=0.5, method="ghost", verify="losses"
    )
    assert torch.equal(got, clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5)[0])
    assert not raw.agreed


def test_private_steps_stay_with_the_loop_after_a_mismatch_and_repeat_to_the_bit():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    x[5, 0] = 50.0
    y = (x[:, 1] > 0).long()
    torch.manual_seed(0)
    model = MixesRarely()
    twins = [copy.deepcopy(model) for _ in range(3)]

    def train(twin, **how):
        plan = PrivacyPlan("sample", 0.5, 0.8, 0.0)
        generator = torch.Generator().manual_seed(0)
        return list(
            private_steps(
                twin, F.cross_entropy, x, y, plan=plan, steps=6, lr=0.5, generator=generator, **how
            )
        )

    records = [train(twins[0]), train(twins[1]), train(twins[2], method="loop")]
    assert torch.equal(flatten(twins[0]), flatten(twins[1]))
    assert not all(record.raw.agreed for record in records[0])
    assert torch.allclose(flatten(twins[0]), flatten(twins[2]), atol=1e-6)


def test_dropout_is_no_mismatch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 3))
    _, x, y = make("rare")
    before = torch.get_rng_state()
    plain, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5, method="ghost")
    torch.set_rng_state(before)
    for verify in ("losses", "gradients"):
        torch.set_rng_state(before)
        got, raw = clipped_gradient_sum(
            model, F.cross_entropy, x, y, clip_norm=0.5, method="ghost", verify=verify
        )
        assert raw.agreed
        assert torch.equal(got, plain)
        assert all(m.training for m in model.modules())


def test_a_forward_pass_that_changes_a_parameter_is_refused_by_name():
    model = Tokens(max_norm=0.1)
    _, x, y = make("embedding")
    with pytest.raises(RecipeError, match=r"model\.embed\.weight: .* leave max_norm out"):
        clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5)


def test_a_network_that_cannot_be_copied_gets_the_loop():
    class Alone(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("only leaf tensors can be copied")

    _, x, y = make("rare")
    assert choose_method(Alone(6, 3), F.cross_entropy, x, y) == "loop"


class Leaks(nn.Module):
    """Adds a rare example to the one beside it, in company alone: by itself the example is as ever."""

    def __init__(self, by):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.by = nn.Linear(6, 8), nn.Linear(8, 3), by

    def forward(self, x):
        h = torch.tanh(self.body(x))
        rare = (x.abs().amax(1, keepdim=True) > 20).float()
        return self.head(h if len(x) == 1 else h + (rare * h).roll(self.by, 0))


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("verify", ["gradients", "losses"])
def test_a_rare_example_that_changes_only_its_neighbour_is_noticed(by, verify):
    chance = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 6, generator=chance), torch.randint(3, (40,), generator=chance)
    for place in (0, 17, 39):
        rare = x.clone()
        rare[place] *= 60
        model = Leaks(by)
        got, raw = clipped_gradient_sum(
            model, F.cross_entropy, rare, y, clip_norm=0.5, method="ghost", verify=verify
        )
        plain, _ = clipped_gradient_sum(model, F.cross_entropy, rare, y, clip_norm=0.5)
        assert not raw.agreed
        assert torch.equal(got, plain)
