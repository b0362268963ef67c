import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.core.parameters import Layout, trainable
from fedpress.errors import RecipeError
from fedpress.models.norms import freeze_batch_norm_
from fedpress.models.resnet import ResNet
from fedpress.privacy.per_example import ghost
from fedpress.privacy.per_example import gradients as gradients_module
from fedpress.privacy.per_example.gradients import (
    METHODS,
    check_separable,
    choose_method,
    clipped_gradient_sum,
)
from fedpress.privacy.per_example.persample import row_norms


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 5)
    )


def frozen_resnet():
    model = freeze_batch_norm_(ResNet(widths=(8, 16), blocks=1, num_classes=5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model


def group_norm_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(16, 16, (1, 3), padding=(0, 1), groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def token_net():
    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(16, 24),
        nn.ReLU(),
        nn.Linear(24, 6),
        nn.LayerNorm(6),
        nn.Flatten(),
        nn.Linear(18, 5),
    )


NETWORKS = {"mlp": mlp, "frozen": frozen_resnet, "group": group_norm_net, "token": token_net}


def batch(n=6, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator), torch.randint(
        5, (n,), generator=generator
    )


def make(name, seed=0):
    torch.manual_seed(seed)
    return NETWORKS[name]()


def by_hand(model, x, y, clip_norm):
    """The slow plain twin: autograd sample by sample, clipped in float64."""
    total = torch.zeros(Layout.of(model).size, dtype=torch.float64)
    for one, label in zip(x, y, strict=True):
        grads = torch.autograd.grad(
            F.cross_entropy(model(one[None]), label[None]), trainable(model)
        )
        flat = torch.cat([g.flatten() for g in grads]).double()
        total += flat * min(1.0, clip_norm / float(flat.norm()))
    return total.float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "size"), [("mlp", 4), ("token", 4), ("frozen", 4), ("frozen", 8), ("group", 8)]
)
def test_every_method_gives_the_sum_of_clipped_gradients(name, size, method):
    model, (x, y) = make(name), batch(size=size)
    norms = [
        float(by_hand(model, x[i : i + 1], y[i : i + 1], math.inf).norm()) for i in range(len(x))
    ]
    clip_norm = sorted(norms)[3]  # some are clipped, some are not
    got, raw = clipped_gradient_sum(
        model, F.cross_entropy, x, y, clip_norm=clip_norm, method=method, chunk=4
    )
    expected = by_hand(model, x, y, clip_norm)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())
    assert raw.examples == 6
    assert raw.refused == 0
    assert raw.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-4)
    assert 0.3 < raw.share_clipped < 0.7


@pytest.mark.parametrize("method", METHODS)
def test_the_sum_is_that_of_opacus(method):
    from opacus.grad_sample import GradSampleModule

    model, (x, y) = make("group"), batch(size=8)
    twin = copy.deepcopy(model)
    twin[2].inplace = False  # Opacus' hooks forbid it
    twin = GradSampleModule(twin, loss_reduction="sum")
    F.cross_entropy(twin(x), y, reduction="sum").backward()
    each = torch.cat([p.grad_sample.flatten(1) for p in twin.parameters()], dim=1)
    expected = ((0.7 / each.norm(dim=1)).clamp_max(1)[:, None] * each).sum(0)
    got, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.7, method=method)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1e12, 1e30, math.inf, math.nan])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(name, method, value):
    model, (x, y) = make(name), batch(n=5)
    x[2] *= value
    with_it, raw = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.3, method=method)
    keep = torch.tensor([0, 1, 3, 4])
    without, _ = clipped_gradient_sum(
        model, F.cross_entropy, x[keep], y[keep], clip_norm=0.3, method=method
    )
    assert torch.isfinite(with_it).all()
    moved = float((with_it.double() - without.double()).norm())
    # the loop alone keeps every other sample's bits; batched kernels round them anew
    assert moved <= 0.3 * (1 + (1e-6 if method == "loop" else 1e-5))
    assert raw.examples == 5
    if not math.isfinite(value):
        assert raw.refused == 1
        assert moved <= 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e18, 1e25])
def test_a_gradient_whose_square_overflows_is_clipped_and_not_lost(method, scale):
    model = nn.Linear(4, 3)
    x, y = torch.ones(2, 4), torch.tensor([0, 1])
    x[1] *= scale
    got, raw = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.5, method=method)
    alone, _ = clipped_gradient_sum(
        model, F.cross_entropy, x[:1], y[:1], clip_norm=0.5, method=method
    )
    assert raw.refused == 0
    moved = float((got - alone).norm())
    assert moved == pytest.approx(0.5, rel=1e-5) or moved == 0  # 0 if the loss is already exactly 0


@pytest.mark.parametrize("method", METHODS)
def test_empty_and_single_batches_are_fine(method):
    model, (x, y) = make("frozen"), batch()
    empty, raw = clipped_gradient_sum(
        model, F.cross_entropy, x[:0], y[:0], clip_norm=1.0, method=method
    )
    assert torch.equal(empty, torch.zeros(Layout.of(model).size))
    assert (raw.examples, raw.refused, raw.share_clipped) == (0, 0, 0.0)
    one, _ = clipped_gradient_sum(
        model, F.cross_entropy, x[:1], y[:1], clip_norm=0.01, method=method
    )
    assert float(one.norm()) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_only_parameters_that_train_are_counted(method):
    model, (x, y) = make("group"), batch(size=8)
    model[0].weight.requires_grad_(False)
    model[7].bias.requires_grad_(False)
    got, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.1, method=method)
    expected = by_hand(model, x, y, 0.1)
    assert got.shape == expected.shape == (Layout.of(model).size,)
    assert float((got - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_gradients_under_autocast_are_clipped_in_float32(method):
    model, (x, y) = make("group"), batch(n=1, size=16)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.25, method=method)
    assert got.dtype == torch.float32
    assert float(got.double().norm()) == pytest.approx(0.25, rel=1e-5)
    expected = by_hand(model, x, y, 0.25)
    assert (
        1e-4 * 0.25 < float((got - expected).norm()) < 0.1 * 0.25
    )  # 16 bits were used, and only in the passes


def test_batch_norm_in_training_mode_is_refused_by_name():
    model = ResNet(widths=(8, 16), blocks=1, num_classes=5)
    with pytest.raises(
        RecipeError, match=r"model\.norm: batch normalisation .* use norm = 'frozen' or 'group'"
    ):
        clipped_gradient_sum(model, F.cross_entropy, *batch(), clip_norm=1.0)
    check_separable(model.eval())
    with pytest.raises(RecipeError, match=r"model\.1:"):
        check_separable(
            nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, track_running_stats=False)).eval()
        )
    with pytest.raises(RecipeError, match=r"model\.0: running statistics"):
        check_separable(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)))


def test_unknown_methods_are_refused_with_a_hint():
    with pytest.raises(RecipeError, match="did you mean 'ghost'"):
        clipped_gradient_sum(mlp(), F.cross_entropy, *batch(), clip_norm=1.0, method="ghots")


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 48)

    def forward(self, x):
        return self.layer(self.layer(x.flatten(1)).tanh())[:, :5]


class Aside(nn.Module):
    """A weight that is also used outside its module's forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 5)

    def forward(self, x):
        return self.layer(x.flatten(1)) + 0.1 * x.flatten(1) @ self.layer.weight.T


class Mixes(nn.Module):
    """Centres over the batch: no sample has a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 5)

    def forward(self, x):
        x = x.flatten(1)
        return self.layer(x - x.mean(0))


def test_the_fast_method_is_chosen_where_it_is_right():
    for name in NETWORKS:
        assert choose_method(make(name), F.cross_entropy, *batch()) == "ghost"
    assert choose_method(Twice(), F.cross_entropy, *batch()) == "vmap"
    assert choose_method(Aside(), F.cross_entropy, *batch()) == "vmap"
    shared = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))
    shared[3].weight = shared[1].weight
    assert not ghost.supports(shared)


def test_a_network_that_mixes_samples_falls_to_the_loop():
    model = Mixes()
    with torch.no_grad():
        model.layer.bias.uniform_(-1, 1)
    x, y = batch()
    method = choose_method(model, F.cross_entropy, x, y)
    a, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.1, method=method)
    b, _ = clipped_gradient_sum(model, F.cross_entropy, x[1:], y[1:], clip_norm=0.1, method=method)
    assert method != "ghost"
    assert float((a - b).norm()) <= 0.1 * (1 + 1e-5)


def test_methods_are_compared_without_tf32_which_is_restored(monkeypatch):
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    seen = []

    def spy(*arguments, **named):
        seen.append((cudnn.conv.fp32_precision, products.fp32_precision))
        return clipped_gradient_sum(*arguments, **named)

    monkeypatch.setattr(gradients_module, "clipped_gradient_sum", spy)
    before = cudnn.allow_tf32, products.allow_tf32, cudnn.conv.fp32_precision
    assert before[0]
    choose_method(group_norm_net(), F.cross_entropy, torch.randn(3, 3, 4, 4), torch.zeros(3).long())
    assert set(seen) == {("ieee", "ieee")}
    assert (cudnn.allow_tf32, products.allow_tf32, cudnn.conv.fp32_precision) == before


def test_choosing_reads_no_private_value_and_changes_nothing():
    model, (x, y) = make("frozen"), batch()
    before = copy.deepcopy(model.state_dict())
    choices = {choose_method(model, F.cross_entropy, x * scale, y) for scale in (1.0, math.nan)}
    assert choices == {"ghost"}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_dropout_is_allowed():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 5))
    for method in METHODS:
        got, raw = clipped_gradient_sum(
            model, F.cross_entropy, *batch(), clip_norm=0.1, method=method
        )
        assert float(got.norm()) <= 0.6 * (1 + 1e-5)
        assert raw.examples == 6


class Center(nn.Module):
    """Subtracts the mean of the batch, in training mode only."""

    def forward(self, x):
        return x - x.mean(0) if self.training else x


def test_a_network_that_mixes_only_while_training_is_not_given_to_the_batched_rules():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), Center(), nn.Linear(12, 5))
    x, y = batch()
    assert choose_method(copy.deepcopy(model).eval(), F.cross_entropy, x, y) == "ghost"
    method = choose_method(model, F.cross_entropy, x, y)
    with_it, _ = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.1, method=method)
    without, _ = clipped_gradient_sum(
        model, F.cross_entropy, x[1:], y[1:], clip_norm=0.1, method=method
    )
    assert method != "ghost"
    assert float((with_it - without).norm()) <= 0.1 * (1 + 1e-5)


class Average(nn.Module):
    """Keeps a moving average of its input, written in place or anew."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("seen", torch.zeros(48))

    def forward(self, x):
        if self.in_place:
            self.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        else:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean(0)
        return x


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("method", ["ghost", "loop"])
def test_a_buffer_that_keeps_private_data_is_refused_by_name(method, in_place):
    model = nn.Sequential(nn.Flatten(), Average(in_place), nn.Linear(48, 5))
    with pytest.raises(RecipeError, match=r"^model\.1\.seen: this buffer changed") as error:
        clipped_gradient_sum(model, F.cross_entropy, *batch(), clip_norm=1.0, method=method)
    assert error.value.place == "model.1.seen"
    assert error.value.cure == "use a layer without running statistics"


@pytest.mark.parametrize("method", METHODS)
def test_the_clip_norm_holds_for_a_gradient_of_millions_of_equal_values(method):
    model = nn.Linear(460_000, 5, bias=False)
    x, y = torch.full((1, 460_000), 1.1), torch.tensor([0])
    got, raw = clipped_gradient_sum(model, F.cross_entropy, x, y, clip_norm=0.25, method=method)
    assert raw.share_clipped == 1
    assert 0.25 * (1 - 1e-5) <= float(got.double().norm()) <= 0.25 * (1 + 1e-6)


@pytest.mark.parametrize("m", [0, 1, 1023, 1024, 1025, 5000])
def test_row_norms_are_those_of_float64(m):
    rows = torch.randn(3, m, generator=torch.Generator().manual_seed(m))
    assert torch.allclose(row_norms(rows), rows.double().norm(dim=1), rtol=1e-6)
    assert row_norms(rows[:0]).shape == (0,)
