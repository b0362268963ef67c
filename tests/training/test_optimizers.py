"""Optimizers: Muon in float32 is torch's, and every parameter comes to the one that suits it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedpress.core.examples import Arrays, Preprocess
from fedpress.models.resnet import resnet_small
from fedpress.training.device import place_
from fedpress.training.fit import Step
from fedpress.training.optimizers import Muon, orthogonalized
from fedpress.training.settings import TrainSettings
from tests.training.trainings import (
    NONE,
    PREPROCESS,
    assert_close,
    batches,
    fit_all,
    fitting,
    images,
    network,
    rates,
    settings,
)


def plain(matrix):
    """Five steps on the whole matrix, in float64."""
    x = matrix.double() / matrix.double().norm()
    x = x.T if len(x) > x.shape[1] else x
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


def with_singular_values(values, columns):
    left = torch.linalg.qr(torch.randn(len(values), len(values))).Q
    right = torch.linalg.qr(torch.randn(columns, len(values))).Q
    return left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("shape", [(64, 64), (32, 288), (288, 32), (1, 40), (40, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_short_side_gives_what_the_whole_matrix_gives(shape, scale):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * scale
    torch.testing.assert_close(orthogonalized(matrix).double(), plain(matrix), atol=2e-5, rtol=0)


@pytest.mark.parametrize("smallest", [-2, -5, -9])
def test_small_singular_values_do_not_blow_up(smallest):
    torch.manual_seed(0)
    matrix = with_singular_values(torch.logspace(0, smallest, 64), 288)
    torch.testing.assert_close(orthogonalized(matrix).double(), plain(matrix), atol=1e-4, rtol=0)
    assert torch.linalg.svdvals(orthogonalized(matrix)).max() < 1.25


def test_singular_values_go_to_one_and_vectors_stay():
    torch.manual_seed(0)
    matrix = with_singular_values(torch.linspace(0.2, 3, 16), 48)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonalized(matrix) @ right.T
    assert (inner.diagonal() > 0.65).all()
    assert (inner.diagonal() < 1.25).all()
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-5, rtol=0)


def test_nothing_gives_nothing_and_the_number_type_stays():
    assert torch.equal(orthogonalized(torch.zeros(4, 8)), torch.zeros(4, 8))
    assert orthogonalized(torch.randn(4, 8, dtype=torch.float64)).dtype == torch.float64
    assert orthogonalized(torch.randn(8, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_steps_are_those_of_torch_but_for_its_bfloat16():
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape)) for shape in ((16, 48), (48, 16), (8, 8))]
    still = nn.Parameter(torch.randn(4, 4))
    twins = copy.deepcopy(mine)
    ours = Muon([*mine, still], 0.02, momentum=0.8, weight_decay=0.1)
    theirs = torch.optim.Muon(twins, 0.02, weight_decay=0.1, momentum=0.8)
    before = still.detach().clone()
    start = copy.deepcopy(mine)
    for _ in range(6):
        for p, twin in zip(mine, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin, first in zip(mine, twins, start, strict=True):
        way = (p - first).norm()
        assert (p - twin).norm() < 0.02 * way  # 8 bits of mantissa, five squarings
    assert torch.equal(still, before)


def test_a_run_that_torch_began_goes_on():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 24))
    theirs = torch.optim.Muon([weight], 0.02, momentum=0.8)
    weight.grad = torch.randn_like(weight)
    theirs.step()
    ours = Muon([weight], 0.5, momentum=0.1)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.02
    assert ours.param_groups[0]["momentum"] == 0.8
    assert torch.equal(
        ours.state[weight]["momentum_buffer"], theirs.state[weight]["momentum_buffer"]
    )
    assert ours.step(lambda: 3.0) == 3.0


def test_muon_equals_muon_on_copies_of_the_matrices():
    s = settings(optimizer="muon", lr=0.02, head_lr=0.03, momentum=0.8, weight_decay=0.1)
    data, model = images(), network("cnn")
    twin = place_(copy.deepcopy(model)).train()
    hidden = {"conv2": twin.conv2.weight, "hidden": twin.hidden.weight}
    matrices = {  # a filter's values in the order height, width, channel
        "conv2": nn.Parameter(
            twin.conv2.weight.detach().permute(0, 2, 3, 1).reshape(64, -1).clone()
        ),
        "hidden": nn.Parameter(twin.hidden.weight.detach().clone()),
    }
    muon = Muon(matrices.values(), s.lr, momentum=0.8, weight_decay=0.1)
    decayed = [twin.conv1.weight, twin.head.weight]
    plain = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    sgd = torch.optim.SGD(groups, s.head_lr, 0.9, nesterov=True)
    for index, rate in zip(batches(s, len(data), 1), rates(s, len(data)), strict=True):
        x = PREPROCESS(data.x[index]).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(twin(x), data.y[index]).backward()
        matrices["conv2"].grad = twin.conv2.weight.grad.permute(0, 2, 3, 1).reshape(64, -1).clone()
        matrices["hidden"].grad = twin.hidden.weight.grad.clone()
        for optimizer, lr in ((muon, s.lr), (sgd, s.head_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
        twin.zero_grad()
        with torch.no_grad():
            hidden["conv2"].copy_(matrices["conv2"].view(64, 3, 3, 32).permute(0, 3, 1, 2))
            hidden["hidden"].copy_(matrices["hidden"])
    fit_all(fitting(model, s, seed=1), data)
    assert_close(model, twin)


def test_muon_sees_hidden_weights_through_views_that_share_their_memory():
    model = resnet_small(width=8)
    fit = fitting(model, settings(optimizer="muon"), seed=0)
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [id(p) for p, _ in fit.optimizers.views] == [id(w) for w in weights[1:-1]]
    for weight, view in fit.optimizers.views:
        with torch.no_grad():
            view.copy_(torch.randn_like(view))
        assert torch.equal(weight.permute(0, 2, 3, 1).flatten(1), view)
    taken = [p for o in fit.optimizers.each for group in o.param_groups for p in group["params"]]
    assert sum(p.numel() for p in taken) == sum(p.numel() for p in model.parameters())


def test_muon_takes_a_shared_weight_once_and_leaves_computed_ones_to_sgd():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    model[2].weight = model[1].weight
    model[4].weight = model[5].weight  # the last layer's
    nn.utils.parametrizations.weight_norm(model[3])
    fit = fitting(model, settings(optimizer="muon"), seed=0)
    assert [id(p) for p, _ in fit.optimizers.views] == [id(model[1].weight)]
    data = Arrays(torch.randn(16, 4), torch.arange(16) % 4)
    before = model[3].weight.detach().clone()
    records = [e for e in fit.epochs(data, NONE, Preprocess()) if not isinstance(e, Step)]
    assert len(records) == 3
    assert not torch.equal(model[3].weight, before)


def test_a_network_without_hidden_weights_trains_at_the_head_rate_of_muon():
    fit = fitting(nn.Linear(4, 2), settings(optimizer="muon", lr=9.0, head_lr=0.25), seed=0)
    assert [group["lr"] for o in fit.optimizers.each for group in o.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_decay_acts_on_weights_and_never_on_biases_and_norms(optimizer):
    model = network("resnet")
    fit = fitting(model, settings(optimizer=optimizer, weight_decay=0.3), seed=0)
    decay = {
        id(p): g["weight_decay"]
        for o in fit.optimizers.each
        for g in o.param_groups
        for p in g["params"]
    }
    decay |= {id(p): decay[id(view)] for p, view in fit.optimizers.views}
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name or "shortcut.1" in name:
            assert decay[id(p)] == 0, name
        elif optimizer == "sgd":
            assert decay[id(p)] == 0.3, name
        else:
            assert decay[id(p)] == (5e-4 if name in ("stem.weight", "head.weight") else 0.3), name


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_step_sizes_get_no_weight_decay_also_where_weights_have_them_in_groups(optimizer):
    from fedpress.nn.quant_scheme import InputQuantization, QuantizationScheme, WeightQuantization
    from fedpress.nn.quantized import quantize_layers_

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.GRU(8, 4))
    grids = {
        "0": QuantizationScheme(
            weights=WeightQuantization(bits=4, group=4), inputs=InputQuantization()
        ),
        "1": QuantizationScheme(
            weights=WeightQuantization(kind="codebook"), inputs=InputQuantization(bits=1)
        ),
        "2": QuantizationScheme(weights=WeightQuantization(kind="ternary", group=2)),
        "4": QuantizationScheme(weights=WeightQuantization(bits=4, group=2)),
    }
    quantize_layers_(model, grids)
    fit = fitting(model, TrainSettings(epochs=1, optimizer=optimizer, weight_decay=0.1), seed=0)
    decayed = {
        id(p)
        for o in fit.optimizers.each
        for g in o.param_groups
        if g["weight_decay"]
        for p in g["params"]
    }
    decayed |= {id(p) for p, _ in fit.optimizers.views}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert names == {
        n for n, _ in model.named_parameters() if n.rpartition(".")[2].startswith("weight")
    } - {n for n, _ in model.named_parameters() if n.endswith("_scale")}


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_a_training_with_adam_equals_torch_over_the_same_batches(name):
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    s = settings(optimizer=name, lr=3e-3, weight_decay=0.1, betas=(0.8, 0.95))
    data, model = images(), network("cnn")
    twin = place_(copy.deepcopy(model)).train()
    decayed = [p for p in twin.parameters() if p.dim() > 1]
    plain = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = make(groups, lr=s.lr, betas=(0.8, 0.95))
    for index, rate in zip(batches(s, len(data), 1), rates(s, len(data)), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * rate
        optimizer.zero_grad()
        x = PREPROCESS(data.x[index]).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(twin(x), data.y[index]).backward()
        optimizer.step()
    fit_all(fitting(model, s, seed=1), data)
    assert_close(model, twin)
    assert not torch.equal(model.conv1.weight, network("cnn").conv1.weight)
